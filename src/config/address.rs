//! Where a process listens or is found: `host:port` or `unix:/path`. Opens no connection.

use std::fmt;
use std::path::PathBuf;

use super::setting::Setting;

/// The longest path of a Unix socket that Linux takes: 108 bytes with the closing zero.
pub const UNIX_PATH_LIMIT: usize = 107;

/// An address of a process of the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// A host name or IP address (IPv6 in brackets), and a port; port 0 lets the system choose when listening.
    Tcp {
        /// The host, without brackets.
        host: String,
        /// The port.
        port: u16,
    },
    /// A Unix socket.
    Unix(PathBuf),
}

impl Address {
    /// The address as tonic's endpoints take it.
    pub fn to_uri(&self) -> String {
        match self {
            Address::Tcp { .. } => format!("http://{self}"),
            Address::Unix(path) => format!("unix://{}", path.display()),
        }
    }

    /// Whether only processes of this machine can reach it.
    pub fn is_local(&self) -> bool {
        match self {
            Address::Tcp { host, .. } => {
                host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
            }
            Address::Unix(_) => true,
        }
    }
}

impl Setting for Address {
    const EXPECTED: &'static str = "host:port, http://host:port or unix:/absolute/path (at most 107 bytes)";

    fn parse(text: &str) -> Option<Self> {
        if let Some(path) = text.strip_prefix("unix:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            let fits = path.starts_with('/') && path.len() <= UNIX_PATH_LIMIT;
            return fits.then(|| Address::Unix(PathBuf::from(path)));
        }
        let authority = text.strip_prefix("http://").unwrap_or(text).trim_end_matches('/');
        let (host, port) = authority.rsplit_once(':')?;
        let bare = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
        let host = match bare {
            Some(ipv6) => ipv6.parse::<std::net::Ipv6Addr>().ok().map(|_| ipv6)?,
            None => host,
        };
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        if host.is_empty() || (bare.is_none() && !host.chars().all(plain)) {
            return None;
        }
        Some(Address::Tcp {
            host: host.to_owned(),
            port: port.parse().ok()?,
        })
    }
}

/// Addresses of a worker process's instances, in order. A path with a comma in it is cut there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Addresses(pub Vec<Address>);

impl Setting for Addresses {
    const EXPECTED: &'static str =
        "host:port, http://host:port or unix:/absolute/path (at most 107 bytes), or several with commas between";

    fn parse(text: &str) -> Option<Self> {
        text.split(',')
            .map(Address::parse)
            .collect::<Option<_>>()
            .map(Addresses)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Address::Tcp { host, port } => write!(f, "{host}:{port}"),
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_is_read_and_printed_in_one() {
        for (text, printed) in [
            ("127.0.0.1:8000", "127.0.0.1:8000"),
            ("http://node-3:8000/", "node-3:8000"),
            ("[::1]:80", "[::1]:80"),
            ("unix:/run/baton.sock", "unix:/run/baton.sock"),
            ("unix:///run/baton.sock", "unix:/run/baton.sock"),
        ] {
            let address = Address::parse(text).expect(text);
            assert_eq!(address.to_string(), printed);
            assert_eq!(Address::parse(&address.to_string()), Some(address));
        }
    }

    #[test]
    fn what_is_no_address_is_refused() {
        let long = format!("unix:/{}", "x".repeat(UNIX_PATH_LIMIT));
        for text in [
            "",
            "localhost",
            ":80",
            "host:70000",
            "https://host:1",
            "::1:80",
            "unix:",
            "unix:relative",
            &long,
        ] {
            assert_eq!(Address::parse(text), None, "{text}");
        }
    }

    #[test]
    fn only_loopback_and_unix_are_local() {
        let local = |text| Address::parse(text).expect("an address").is_local();
        assert!(local("127.0.0.1:1") && local("[::1]:1") && local("unix:/a") && local("localhost:1"));
        assert!(!local("0.0.0.0:1") && !local("10.0.0.1:1") && !local("[::]:1"));
    }
}
