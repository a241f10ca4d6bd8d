//! The rate of KV from one process to another, by each transport as a handoff uses it, against plain blocking sockets and a
//! plain copy in the same run.
//!
//! `cargo bench --bench kv_stream -- [--rounds N] [--size BYTES] [--output FILE]`. This process pulls, its child sends. A
//! transfer is the KV of 16,384 tokens of Llama-3.2-1B, 512 MiB in frames of 1 MiB, packed from a real cache and landed in
//! the reserved blocks of another, every byte of which is compared at the end. Not measured: the computing, and the state
//! machines around the frames.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, bail};
use baton::doctor::transfer::{TransferConfig, listen, measure};

/// The argument that makes this program the sending process.
const LISTEN: &str = "--listen";

fn main() -> anyhow::Result<()> {
    let mut config = TransferConfig {
        n_rounds: 9,
        n_bytes: 512 << 20,
        peer: None,
        json: true,
        card: None,
    };
    let (mut output, mut listen_at) = (None::<PathBuf>, None::<String>);
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let mut value = || arguments.next().with_context(|| format!("{name}: a value is missing"));
        match name.as_str() {
            LISTEN => listen_at = Some(value()?),
            "--rounds" => config.n_rounds = value()?.parse().context("--rounds")?,
            "--size" => config.n_bytes = value()?.parse().context("--size")?,
            "--output" => output = Some(value()?.into()),
            // Cargo says so to every bench.
            "--bench" => {}
            other => bail!("unknown argument {other:?}, expected --rounds, --size or --output"),
        }
    }
    if let Some(address) = listen_at {
        return listen(&address, config.n_bytes, None);
    }
    let sender = || -> anyhow::Result<Command> {
        let mut command = Command::new(std::env::current_exe()?);
        let n_bytes = config.n_bytes.to_string();
        command.args([LISTEN, "127.0.0.1:0", "--size", &n_bytes]);
        Ok(command)
    };
    let mut report = serde_json::to_value(measure(&config, sender)?)?;
    report["bench"] = "kv_stream".into();
    let report = serde_json::to_string_pretty(&report)?;
    println!("{report}");
    if let Some(path) = output {
        std::fs::write(&path, report).with_context(|| path.display().to_string())?;
    }
    Ok(())
}
