//! The child's side of dying with its parent: by the kernel's parent-death signal, and by a pipe on stdin whose end tells
//! that the parent is gone, however it died. Stops nothing gracefully: without a front door nobody waits for an answer.

use std::io::Read as _;

use rustix::process::{Signal, set_parent_process_death_signal};

use crate::config::ConfigError;

/// Ends this process when its parent has died. Called first of all in a child of `serve`.
pub fn hold() -> anyhow::Result<()> {
    // The signal covers a child whose threads are all stuck; the pipe covers a parent that died before this line.
    set_parent_process_death_signal(Some(Signal::KILL))?;
    if std::io::IsTerminal::is_terminal(&std::io::stdin()) {
        let message = "--supervised: stdin is a terminal, expected the pipe that `baton serve` gives its children";
        return Err(ConfigError::Impossible(message.into()).into());
    }
    let watch = || {
        let mut ignored = [0_u8; 64];
        loop {
            match std::io::stdin().lock().read(&mut ignored) {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        std::process::exit(1);
    };
    std::thread::Builder::new().name("lifeline".into()).spawn(watch)?;
    Ok(())
}
