//! The lines on stdout that other programs wait for. Everything else a process says goes to stderr.

use std::io::Write as _;
use std::net::SocketAddr;

/// What a front door prints once it can serve a request, with the real port.
pub fn ready_line(address: SocketAddr) -> String {
    // A client cannot connect to "any address"; the loopback one of the same family always works on this machine.
    let host = match address {
        SocketAddr::V4(v4) if v4.ip().is_unspecified() => "127.0.0.1".to_owned(),
        SocketAddr::V6(v6) if v6.ip().is_unspecified() => "[::1]".to_owned(),
        SocketAddr::V4(v4) => v4.ip().to_string(),
        SocketAddr::V6(v6) => format!("[{}]", v6.ip()),
    };
    format!("baton ready: http://{host}:{}", address.port())
}

/// What a worker prints once the registry has accepted it.
pub fn worker_ready_line(instance_id: &str) -> String {
    format!("baton worker ready: {instance_id}")
}

/// Prints `line` on stdout at once, even into a pipe. A reader that has gone away is no reason to stop.
pub fn print(line: &str) {
    let mut stdout = std::io::stdout().lock();
    let _ = writeln!(stdout, "{line}").and_then(|()| stdout.flush());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ready_line_holds_a_url_that_can_be_used() {
        for (address, url) in [
            ("127.0.0.1:8000", "http://127.0.0.1:8000"),
            ("0.0.0.0:41234", "http://127.0.0.1:41234"),
            ("[::]:80", "http://[::1]:80"),
            ("[fe80::1]:80", "http://[fe80::1]:80"),
        ] {
            assert_eq!(
                ready_line(address.parse().expect("an address")),
                format!("baton ready: {url}")
            );
        }
    }
}
