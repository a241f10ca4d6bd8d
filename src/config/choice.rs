//! Settings with a few named values. What a value does is decided where it is used.

use std::fmt;

use baton_scheduler::ids::Role;

use super::setting::Setting;

macro_rules! choice {
    (
        $(#[$doc:meta])* $kind:ident, $expected:literal;
        $($(#[$variant_doc:meta])* $variant:ident = $name:literal,)*
    ) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $kind {
            $($(#[$variant_doc])* $variant,)*
        }

        impl $kind {
            /// Every value, in the order of the help text.
            pub const ALL: &'static [$kind] = &[$($kind::$variant),*];

            /// The name on command lines, in files and in logs.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $($kind::$variant => $name,)*
                }
            }
        }

        impl Setting for $kind {
            const EXPECTED: &'static str = $expected;

            fn parse(text: &str) -> Option<Self> {
                $kind::ALL.iter().copied().find(|value| value.as_str() == text)
            }
        }

        impl clap::ValueEnum for $kind {
            fn value_variants<'a>() -> &'a [Self] {
                $kind::ALL
            }

            fn to_possible_value(&self) -> Option<clap::builder::PossibleValue> {
                Some(clap::builder::PossibleValue::new(self.as_str()))
            }
        }

        impl fmt::Display for $kind {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

choice! {
    /// Whether something is done.
    Switch, "on or off";
    /// It is.
    On = "on",
    /// It is not.
    Off = "off",
}

choice! {
    /// How KV gets from one instance to another.
    KvTransportKind, "auto, grpc, shared-memory, cuda-ipc or in-process";
    /// The best that both ends can do.
    Auto = "auto",
    /// Inside the messages.
    Grpc = "grpc",
    /// Between processes of one host, through memory that both map.
    SharedMemory = "shared-memory",
    /// Between processes on one card, or on two that reach each other.
    CudaIpc = "cuda-ipc",
    /// Between instances of one process.
    InProcess = "in-process",
}

choice! {
    /// Element type of weights, KV cache and the inputs of matrix products.
    ComputeDtype, "bf16, f16 or f32";
    /// bfloat16, accumulated in f32.
    Bf16 = "bf16",
    /// IEEE half precision, accumulated in f32; on CUDA only.
    F16 = "f16",
    /// IEEE single precision.
    F32 = "f32",
}

choice! {
    /// Where weights come from.
    LoadFormat, "auto or dummy";
    /// The folder's safetensors.
    Auto = "auto",
    /// Seeded random weights; only `config.json` is read.
    Dummy = "dummy",
}

choice! {
    /// What to compute on.
    Device, "cpu, auto or cuda";
    /// The processor.
    Cpu = "cpu",
    /// A card where there is one that serves, else the processor.
    Auto = "auto",
    /// An NVIDIA GPU.
    Cuda = "cuda",
}

choice! {
    /// The CPU instruction set to compute with.
    InstructionSet, "auto, avx512-bf16, avx512, avx2 or portable";
    /// The best one that the processor has.
    Auto = "auto",
    /// AVX-512 with bf16 dot products.
    Avx512Bf16 = "avx512-bf16",
    /// AVX-512.
    Avx512 = "avx512",
    /// AVX2 with FMA.
    Avx2 = "avx2",
    /// No instruction set beyond the target's own.
    Portable = "portable",
}

choice! {
    /// How calls of tools are found in a model's text.
    ToolCallParserKind, "auto, hermes, llama3, mistral or none";
    /// As the chat template tells.
    Auto = "auto",
    /// Between `<tool_call>` and `</tool_call>`.
    Hermes = "hermes",
    /// Objects with `parameters`.
    Llama3 = "llama3",
    /// After `[TOOL_CALLS]`.
    Mistral = "mistral",
    /// Not at all: they stay in the content.
    None = "none",
}

choice! {
    /// How reasoning is found in a model's text.
    ReasoningParserKind, "auto, think or none";
    /// As the chat template tells.
    Auto = "auto",
    /// Between `<think>` and `</think>`.
    Think = "think",
    /// Not at all: it stays in the content.
    None = "none",
}

choice! {
    /// How instances are picked for a request.
    PolicyKind, "round-robin, least-loaded, llumnix, slo-aware or prefix-aware";
    /// Each in turn.
    RoundRobin = "round-robin",
    /// The one with the least work.
    LeastLoaded = "least-loaded",
    /// The one with the most free blocks for each sequence.
    Llumnix = "llumnix",
    /// One that is predicted to meet both latency objectives.
    SloAware = "slo-aware",
    /// The one that is predicted to answer first, cached prefixes counted.
    PrefixAware = "prefix-aware",
}

choice! {
    /// What is done with uneven load.
    RebalanceMode, "off, advise or act";
    /// Nothing.
    Off = "off",
    /// What should move is logged.
    Advise = "advise",
    /// It is moved.
    Act = "act",
}

choice! {
    /// Whose names the metrics have besides their own.
    MetricsAliases, "none or vllm";
    /// Nobody's.
    None = "none",
    /// vLLM's.
    Vllm = "vllm",
}

choice! {
    /// The form of log lines.
    LogFormat, "text or json";
    /// For people.
    Text = "text",
    /// One JSON object per line.
    Json = "json",
}

impl Setting for Role {
    const EXPECTED: &'static str = "prefill, decode or mixed";

    fn parse(text: &str) -> Option<Self> {
        [Role::Prefill, Role::Decode, Role::Mixed]
            .into_iter()
            .find(|role| role.as_str() == text)
    }
}

/// The roles of a worker process's instances, in order; a role may stand there more than once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Roles(pub Vec<Role>);

impl Setting for Roles {
    const EXPECTED: &'static str = "prefill, decode or mixed, or several with commas between";

    fn parse(text: &str) -> Option<Self> {
        text.split(',').map(Role::parse).collect::<Option<_>>().map(Roles)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check<T: Setting + Copy + PartialEq + fmt::Debug + fmt::Display>(all: &[T]) {
        for value in all {
            let name = value.to_string();
            assert_eq!(T::parse(&name), Some(*value));
            assert!(T::EXPECTED.contains(&name), "{:?} does not mention {name}", T::EXPECTED);
            assert_eq!(T::parse(&name.to_uppercase()), None);
        }
    }

    #[test]
    fn every_name_is_read_back_and_is_in_the_message() {
        check(ComputeDtype::ALL);
        check(LoadFormat::ALL);
        check(Device::ALL);
        check(InstructionSet::ALL);
        check(PolicyKind::ALL);
        check(ToolCallParserKind::ALL);
        check(ReasoningParserKind::ALL);
        check(LogFormat::ALL);
        check(&[Role::Prefill, Role::Decode, Role::Mixed]);
    }
}
