//! The CUDA operators at the shapes of Llama-3, each beside the limit that binds it, measured in turn with it.
//!
//! `cuda_ops [PART...] [--smoke] [--libraries FOLDERS] [--kernels FOLDER] [--images FOLDER] [--output FILE]`. Times are the
//! card's own, of single runs with cold caches: a wall clock would show how fast the host launches. `--smoke` runs every part
//! on tiny shapes, without REQUIRE_GPU=1 on the stand-in for the driver, whose numbers mean nothing. `stand-in` prints where
//! that was built.

mod attention;
mod device;
mod operators;
mod point;
mod products;
mod sampling;
#[allow(dead_code, reason = "shared with the tests")]
#[path = "../../tests/cuda_device/stand_in/mod.rs"]
mod stand_in;
mod transfers;

use std::path::PathBuf;

use baton_kernels::KernelError;
use device::Source;
use point::Report;

/// Measures its share of the operators.
type Part = fn(&Options, &mut Report);

/// What can be asked for, in the order in which it is run.
const PARTS: [(&str, Part); 6] = [
    ("decode", attention::decode),
    ("prefill", attention::prefill),
    ("operators", operators::run),
    ("products", products::run),
    ("sampling", sampling::run),
    ("transfers", transfers::run),
];

/// How much is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// What a card is measured with.
    Full,
    /// What shows that everything runs.
    Smoke,
}

/// The command line.
pub struct Options {
    scale: Scale,
    source: Source,
}

fn main() {
    let mut parts = Vec::new();
    let mut scale = Scale::Full;
    let mut source = Source::default();
    let mut output = None;
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || {
            let value = arguments.next();
            PathBuf::from(value.unwrap_or_else(|| fail(&format!("{argument}: a value is missing"))))
        };
        match argument.as_str() {
            "stand-in" => return print_stand_in(),
            "--smoke" => scale = Scale::Smoke,
            "--libraries" => source.libraries = std::env::split_paths(&value()).collect(),
            "--kernels" => source.images.packaged = Some(value()),
            "--images" => source.images.cache = Some(value()),
            "--output" => output = Some(value()),
            // Cargo says so to every bench.
            "--bench" => {}
            name => match PARTS.iter().find(|(part, _)| *part == name) {
                Some(part) => parts.push(part),
                None => fail(&format!(
                    "unknown argument {name:?}, expected one of {}, stand-in, --smoke, --libraries, --kernels, --images or --output",
                    PARTS.map(|(part, _)| part).join(", ")
                )),
            },
        }
    }
    if scale == Scale::Smoke && !source.use_stand_in() {
        return;
    }
    let options = Options { scale, source };
    let mut report = Report::create(output.as_deref(), scale);
    if parts.is_empty() {
        parts.extend(&PARTS);
    }
    for (_, run) in parts {
        run(&options, &mut report);
    }
}

fn print_stand_in() {
    match stand_in::driver() {
        Some(stand_in::Driver::StandIn(folder)) => println!("{}", folder.display()),
        Some(stand_in::Driver::Card) => fail("REQUIRE_GPU=1: the card has no stand-in"),
        None => fail("no g++ to build the stand-in with"),
    }
}

/// Ends the program as a usage error does.
fn fail(message: &str) -> ! {
    eprintln!("cuda_ops: {message}");
    std::process::exit(2)
}

/// What a card that cannot be measured says, as the program's error.
fn or_fail<T>(result: Result<T, KernelError>) -> T {
    result.unwrap_or_else(|error| fail(&error.to_string()))
}
