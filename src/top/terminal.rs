//! The terminal: it takes keys and snapshots, draws a frame after each, and is left as it was found.

use std::io;

use crossterm::event::{Event, EventStream, KeyEventKind};
use futures::StreamExt as _;
use ratatui::DefaultTerminal;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::view::{Flow, Polled, View};

/// Shows `view` until a key, a signal or the end of the terminal's input ends it.
pub async fn show(view: View, polls: mpsc::Receiver<Polled>) -> io::Result<()> {
    // Also restores the terminal if this process panics.
    let terminal = ratatui::try_init()?;
    let shown = run(terminal, view, polls).await;
    ratatui::try_restore()?;
    shown
}

async fn run(mut terminal: DefaultTerminal, mut view: View, mut polls: mpsc::Receiver<Polled>) -> io::Result<()> {
    let mut events = EventStream::new();
    let mut terminated = signal(SignalKind::terminate())?;
    loop {
        terminal.draw(|frame| frame.render_widget(&view, frame.area()))?;
        let flow = tokio::select! {
            event = events.next() => match event {
                Some(Ok(Event::Key(key))) if key.kind == KeyEventKind::Press => view.key(key),
                // A new size, say: the next frame has it.
                Some(Ok(_)) => Flow::Continue,
                Some(Err(error)) => return Err(error),
                None => Flow::Quit,
            },
            Some(polled) = polls.recv() => {
                view.take(polled);
                Flow::Continue
            }
            _ = terminated.recv() => Flow::Quit,
        };
        if flow == Flow::Quit {
            return Ok(());
        }
    }
}
