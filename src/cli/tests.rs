//! Command lines against the configurations they mean.

use std::collections::BTreeSet;

use clap::CommandFactory as _;

use super::*;
use crate::config::{ByteSize, Device, KEYS, KvMemory, LoadFormat, PolicyKind, Setting as _};
use crate::supervisor::ServeConfig;
use crate::worker_process::WorkerConfig;

const MACHINE: Machine = Machine {
    n_cores: 8,
    free_memory_bytes: 6 << 30,
};

fn layers(variables: &[(&str, &str)]) -> Layers {
    let variables = variables.iter().map(|(name, value)| (name.into(), value.into()));
    let environment = Environment::from_variables(variables).expect("valid variables");
    Layers::open(environment, None).expect("no file")
}

fn serve(arguments: &str, variables: &[(&str, &str)]) -> anyhow::Result<ServeConfig> {
    let words = ["baton", "serve"].into_iter().chain(arguments.split_whitespace());
    match Arguments::try_parse_from(words)?.command {
        Command::Serve(flags) => Ok(flags.resolve(&layers(variables), &MACHINE)?),
        other => panic!("{other:?} is not serve"),
    }
}

fn worker(arguments: impl IntoIterator<Item = std::ffi::OsString>) -> anyhow::Result<WorkerConfig> {
    let words = std::iter::once("baton".into()).chain(arguments);
    match Arguments::try_parse_from(words)?.command {
        Command::Worker(flags) => Ok(flags.resolve(&layers(&[]), &MACHINE)?.0),
        other => panic!("{other:?} is not worker"),
    }
}

#[test]
fn the_definitions_are_sound() {
    Arguments::command().debug_assert();
}

#[test]
fn serve_without_arguments_divides_the_machine_between_two_instances() {
    let config = serve("", &[]).expect("valid");
    assert_eq!(config.processes.len(), 2);
    assert_eq!(config.scheduler.listen.to_string(), "127.0.0.1:8000");
    assert_eq!(config.scheduler.model.served_name, "baton-demo");
    assert_eq!(config.worker.engine.n_threads, 4);
    assert_eq!(
        config.worker.engine.kv_memory,
        KvMemory::Size(ByteSize(3 << 29)),
        "half of 6 GiB, for two"
    );
    assert_eq!(config.scheduler.policy, PolicyKind::PrefixAware);
}

#[test]
fn flags_win_over_variables() {
    let variables = [
        ("BATON_PORT", "9000"),
        ("BATON_POLICY", "least-loaded"),
        ("BATON_DECODE", "3"),
    ];
    let config = serve("--port 0 --kv-memory 512MiB --threads 3", &variables);
    let config = config.expect_err("decode alone cannot serve").to_string();
    assert!(config.contains("prefill 0, decode 3, mixed 0"), "{config}");

    let config = serve("--port 0 --kv-memory 512MiB --threads 3 --prefill 1", &variables).expect("valid");
    assert_eq!(config.scheduler.listen.port(), 0);
    assert_eq!(config.scheduler.policy, PolicyKind::LeastLoaded);
    assert_eq!(config.processes.len(), 4);
    assert_eq!(
        (config.worker.engine.n_threads, config.worker.engine.kv_memory),
        (3, KvMemory::Size(ByteSize(512 << 20)))
    );
}

#[test]
fn a_child_reads_from_its_command_line_what_serve_resolved() {
    let arguments = "--dtype f32 --isa portable --load-format dummy --max-model-len 777 --max-num-seqs 5 --block-size 32 \
                     --max-batch-tokens 99 --keepalive 250ms --progress-deadline 1m --served-model-name tiny";
    let parent = serve(arguments, &[]).expect("valid").worker;
    let child = worker(parent.to_arguments()).expect("a command line of our own");
    assert_eq!(child.engine, parent.engine);
    assert_eq!(child.engine.max_model_len, Some(777));
    assert_eq!(
        (child.model.source, child.model.served_name.as_str()),
        (parent.model.source, "tiny")
    );
    assert_eq!(child.model.load_format, LoadFormat::Dummy);
    assert_eq!((child.instances, child.scheduler), (parent.instances, parent.scheduler));
    assert_eq!(child.links.keepalive, parent.links.keepalive);
    assert_eq!(child.links.progress_deadline, parent.links.progress_deadline);
}

#[test]
fn secrets_are_neither_on_a_childs_command_line_nor_in_debug_output() {
    let config = serve("--api-key key-12345 --cluster-secret secret-12345", &[]).expect("valid");
    let command_line = format!("{:?}", config.worker.to_arguments());
    let debug = format!("{config:?}");
    for text in [command_line, debug] {
        assert!(!text.contains("12345"), "{text}");
    }
    assert!(config.scheduler.api_key.is_some_and(|key| key.matches(b"key-12345")));
}

#[test]
fn serve_makes_a_secret_when_none_is_given() {
    let config = serve("", &[]).expect("valid");
    let secret = config.worker.links.cluster_secret.expect("made");
    assert_eq!(secret.expose().len(), 64);
    assert!(
        config
            .scheduler
            .links
            .cluster_secret
            .expect("the same")
            .matches(secret.expose().as_bytes())
    );
}

#[test]
fn bad_values_name_the_flag_the_value_and_what_was_expected() {
    for (arguments, parts) in [
        ("--port 70000", ["--port", "70000", "0 to 65535"]),
        ("--kv-memory 2", ["--kv-memory", "'2'", "such as 2GiB"]),
        (
            "--prefill-sm-share 60",
            ["--prefill-sm-share", "'60'", "from 1% to 100%"],
        ),
        (
            "--prefill-sm-share 0%",
            ["--prefill-sm-share", "'0%'", "from 1% to 100%"],
        ),
        ("--keepalive 5", ["--keepalive", "'5'", "such as 5s"]),
        ("--policy random", ["--policy", "random", "prefix-aware"]),
        ("--model /no/such/folder", ["--model", "/no/such/folder", "ORG/NAME"]),
        ("--block-size 24", ["block_size", "24", "power of two"]),
        ("--kv-memory 90% --device cpu", ["kv_memory", "90%", "such as 2GiB"]),
        ("--dtype f16 --device cpu", ["dtype", "f16", "bf16 or f32"]),
        ("--max-num-seqs 0", ["--max-num-seqs", "'0'", "at least 1"]),
        ("--log-level loud=very", ["log_level", "loud=very", "debug"]),
        ("--prefill 300 --decode 1", ["prefill 300", "decode 1", "at most 256"]),
    ] {
        let message = serve(arguments, &[]).expect_err(arguments).to_string();
        for part in parts {
            assert!(message.contains(part), "{arguments}: {message}");
        }
    }
}

#[test]
fn a_worker_needs_a_role_a_scheduler_and_off_loopback_a_secret() {
    let message = |arguments: &str| {
        let words = format!("worker {arguments}");
        worker(words.split_whitespace().map(Into::into))
            .expect_err(arguments)
            .to_string()
    };
    assert!(message("--scheduler a:1").starts_with("role: missing"));
    assert!(message("--role decode").starts_with("scheduler: missing"));
    assert!(message("--role both --scheduler a:1").contains("prefill, decode or mixed"));
    let off_loopback = message("--role decode --scheduler a:1 --listen 0.0.0.0:1");
    assert!(off_loopback.starts_with("cluster_secret: missing"), "{off_loopback}");
    assert!(message("--role decode --scheduler a:1 --id a/b").starts_with("id: found \"a/b\""));
}

#[test]
fn a_worker_of_several_roles_has_an_instance_of_each() {
    let resolved = |arguments: &str| {
        let words = format!("worker --scheduler a:1 {arguments}");
        worker(words.split_whitespace().map(Into::into))
    };
    let names = |arguments: &str| {
        let instances = resolved(arguments).expect(arguments).instances;
        instances
            .iter()
            .map(|instance| instance.id.to_string())
            .collect::<Vec<_>>()
            .join(" ")
    };
    assert_eq!(
        names("--role prefill,decode,decode --id n"),
        "n-prefill n-decode n-decode-2"
    );
    assert_eq!(names("--role mixed,mixed --id a,b"), "a b");
    assert_eq!(names("--role decode --id n"), "n");
    let pid = std::process::id();
    assert_eq!(names("--role decode"), format!("decode-{pid}"));
    assert_eq!(names("--role mixed,mixed"), format!("mixed-{pid} mixed-{pid}-2"));
    let config = resolved("--role prefill,decode").expect("valid");
    assert_eq!(
        (config.engine.n_threads, config.engine.kv_memory),
        (4, KvMemory::Size(ByteSize(3 << 29)))
    );
    let config = resolved("--role prefill,decode --listen 127.0.0.1:1,unix:/b --advertise c:3,d:4").expect("valid");
    let again = worker(config.to_arguments()).expect("a command line of our own");
    assert_eq!(again.instances, config.instances);
    assert_eq!(config.instances[1].listen.to_string(), "unix:/b");
    for (arguments, expected) in [
        (
            "--role prefill,decode --listen 127.0.0.1:7000",
            "listen: found 127.0.0.1:7000, expected an address for each of 2",
        ),
        (
            "--role prefill,decode --advertise a:7000",
            "advertise: found a:7000, expected an address for each of 2",
        ),
        (
            "--role prefill,decode --id a,b,c",
            "id: found 3 names, expected one for each of 2 roles",
        ),
        ("--role prefill,decode --id a,a", "id: found \"a\" twice"),
        (
            "--role prefill,decode --listen 127.0.0.1:1,0.0.0.0:2",
            "cluster_secret: missing",
        ),
    ] {
        let message = resolved(arguments).expect_err(arguments).to_string();
        assert!(message.starts_with(expected), "{message}");
    }
}

#[test]
fn colocate_is_a_flag_with_or_without_its_value() {
    for (arguments, variable, n_processes) in [
        ("--prefill 2 --decode 2", "off", 4),
        ("--prefill 2 --decode 2", "on", 2),
        ("--colocate --prefill 2 --decode 2", "off", 2),
        ("--colocate=off --prefill 2 --decode 2", "on", 4),
    ] {
        let config = serve(arguments, &[("BATON_COLOCATE", variable)]).expect(arguments);
        assert_eq!(config.processes.len(), n_processes, "{arguments}");
        assert_eq!(config.scheduler.n_awaited_instances, 4);
        assert_eq!(config.worker.engine.n_threads, 2, "of each instance");
    }
}

#[test]
fn templates_of_requests_are_trusted_only_when_asked() {
    use crate::config::Switch;

    const VARIABLE: &str = "BATON_TRUST_REQUEST_CHAT_TEMPLATE";
    for (arguments, variables, expected) in [
        ("", &[][..], Switch::Off),
        ("--trust-request-chat-template", &[], Switch::On),
        ("", &[(VARIABLE, "on")], Switch::On),
        ("--trust-request-chat-template=off", &[(VARIABLE, "on")], Switch::Off),
    ] {
        let config = serve(arguments, variables).expect(arguments);
        assert_eq!(config.scheduler.client_chat_templates, expected, "{arguments}");
    }
}

fn bench(arguments: &str) -> anyhow::Result<crate::bench::BenchConfig> {
    let words = ["baton", "bench"].into_iter().chain(arguments.split_whitespace());
    match Arguments::try_parse_from(words)?.command {
        Command::Bench(flags) => Ok(flags.resolve(&layers(&[]))?),
        other => panic!("{other:?} is not bench"),
    }
}

#[test]
fn bench_flags_say_which_load_and_what_is_done_with_it() {
    use crate::bench::Mode;
    use crate::bench::workload::{ArrivalProcess, Arrivals, Lengths};

    let config = bench("").expect("valid");
    assert_eq!(config.workload.arrivals, Arrivals::Closed { concurrency: 1 });
    assert_eq!((config.mode, config.workload.n_requests), (Mode::Once, 32));

    let config =
        bench("--rate 4 --arrivals gamma:2.5 --input-len uniform:3-9 --output-len sharegpt --turns 2").expect("valid");
    let process = ArrivalProcess::Gamma { cv: 2.5 };
    assert_eq!(config.workload.arrivals, Arrivals::Open { rate: 4.0, process });
    assert_eq!(config.workload.input, Lengths::Uniform { low: 3, high: 9 });
    assert_eq!(config.workload.output, crate::bench::workload::SHAREGPT_OUTPUTS);

    for goodput in ["ttft:500ms,tpot:50ms", "ttft:500 tpot:50"] {
        let config = bench(&format!("--sweep --rate 2 --goodput {goodput} --attainment 0.95")).expect(goodput);
        assert_eq!(config.objectives.to_string(), "ttft:500ms,tpot:50ms");
        assert!(matches!(config.mode, Mode::Sweep(options) if options.start == 2.0 && options.attainment == 0.95));
    }
    let config = bench("--compare 127.0.0.1:9 --rounds 5 --endpoint baton.v1").expect("valid");
    assert!(matches!(config.mode, Mode::Compare { n_rounds: 5, .. }));

    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("trace.csv");
    let lines = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.5,12,3\n2023-11-16 18:17:04,5,2\n";
    std::fs::write(&path, lines).expect("written");
    let trace = format!("--trace {}", path.display());
    let config = bench(&format!("{trace} --time-scale 0.5")).expect("valid");
    assert_eq!(config.workload.arrivals, Arrivals::Recorded { scale: 0.5 });
    assert_eq!(config.workload.n_requests, 2, "all of it");
    let config = bench(&format!("{trace} --rate 3 --num-prompts 1")).expect("valid");
    assert!(matches!(config.workload.arrivals, Arrivals::Open { .. }) && config.workload.trace.is_some());

    for (arguments, part) in [
        ("--rate 0", "--rate"),
        ("--arrivals gamma", "gamma:CV"),
        ("--input-len 0", "uniform:LOW-HIGH"),
        ("--goodput itl:5ms", "goodput: found \"itl:5ms\""),
        ("--sweep", "--goodput"),
        ("--sweep --rate inf --goodput ttft:1", "rate: found inf"),
        ("--sweep --compare a:1 --goodput ttft:1", "--compare"),
        ("--sweep --goodput ttft:1 --attainment 1.5", "--attainment"),
        ("--attainment 0.5", "--sweep"),
        ("--rounds 2", "--compare"),
        ("--time-scale 2", "--trace"),
        ("--turns 1001", "from 1 to 1000"),
        ("--prefix-len 200", "prefix-len: found 200"),
        ("--compare unix:/x", "compare: found unix:/x"),
        ("--trace /no/such/trace", "/no/such/trace"),
        (
            &format!("{trace} --num-prompts 3"),
            "num-prompts: found 3, expected at most 2",
        ),
        (&format!("{trace} --turns 2"), "--turns"),
    ] {
        let message = bench(arguments).expect_err(arguments).to_string();
        assert!(message.contains(part), "{arguments}: {message}");
    }
}

#[test]
fn exit_codes_tell_configuration_from_running() {
    let configuration = anyhow::Error::from(ConfigError::Impossible("x".into())).context("while starting");
    assert_eq!(exit_code(&configuration), EXIT_CONFIG);
    assert_eq!(exit_code(&anyhow::anyhow!("connection reset")), EXIT_RUN);
}

#[test]
fn every_setting_is_a_flag_and_every_process_flag_a_setting() {
    let process_commands = ["serve", "scheduler", "worker"];
    let not_settings = ["help", "version", "config", "supervised"];
    let command = Arguments::command();
    let flags_of = |name: &str| -> BTreeSet<String> {
        let subcommand = command.find_subcommand(name).expect("a subcommand");
        let longs = subcommand.get_arguments().filter_map(|argument| argument.get_long());
        longs
            .filter(|long| !not_settings.contains(long))
            .map(|long| long.replace('-', "_"))
            .collect()
    };
    let keys: BTreeSet<String> = KEYS.iter().map(|key| key.name.to_owned()).collect();
    let mut flags: BTreeSet<String> = process_commands.into_iter().flat_map(flags_of).collect();
    assert!(flags_of("ctl").contains("server"));
    flags.insert("server".into());
    assert_eq!(flags, keys);
}

#[test]
fn a_card_that_is_not_there_is_named_in_one_line() {
    assert_eq!(Device::parse("cuda"), Some(Device::Cuda));
    let Err(missing) = baton_engine::cuda::probe(0, &[]) else {
        return;
    };
    let error = serve("", &[("BATON_DEVICE", "cuda")]).expect_err("no card");
    assert_eq!(error.to_string(), format!("device: cuda: {missing}"));
    assert!(!error.to_string().contains('\n'));
    assert_eq!(exit_code(&error), EXIT_CONFIG);
}

#[test]
fn the_documents_name_every_setting_and_the_example_file_is_valid() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let operations = std::fs::read_to_string(root.join("docs/operations.md")).expect("docs/operations.md");
    let example = std::fs::read_to_string(root.join("deploy/baton.toml")).expect("deploy/baton.toml");
    for key in KEYS {
        assert!(
            operations.contains(&format!("`{}`", key.name)),
            "docs/operations.md does not explain {}",
            key.name
        );
        assert!(
            example.contains(key.name),
            "deploy/baton.toml does not show {}",
            key.name
        );
    }
    let environment = Environment::default();
    let layers = Layers::open(environment, Some(&root.join("deploy/baton.toml"))).expect("a valid file");
    let flags = serve::ServeFlags::default();
    assert_eq!(
        flags
            .resolve(&layers, &MACHINE)
            .expect("valid settings")
            .processes
            .len(),
        2
    );
}
