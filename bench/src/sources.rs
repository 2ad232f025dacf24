//! Local addresses of the clients: a connection needs a port of its own, and one address has only so many.
//!
//! Read once a run by the main thread, then used by every generator thread; nothing in it changes. Invariants: clients
//! beyond the ports of one loopback address get the next one (127.0.0.2, 127.0.0.3, …), each with all ports of the range;
//! the port is chosen when the connection is made, so that two connections share one only if their far ends differ.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};

use nix::sys::socket::{setsockopt, sockopt::IpBindAddressNoPort};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

const RANGE_FILE: &str = "/proc/sys/net/ipv4/ip_local_port_range";
/// What Linux has if nobody changes it.
const DEFAULT_PORTS: u32 = 28_232;
/// One port of so many stays free: for listeners in the range, and for connections that just ended.
const SPARE_SHARE: u32 = 64;

/// How the clients of a run reach their server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sources {
    target: SocketAddr,
    clients_per_address: u32,
}

impl Sources {
    /// For clients of this server, by the port range of this machine.
    pub fn to(target: SocketAddr) -> Self {
        let ports = std::fs::read_to_string(RANGE_FILE).ok().and_then(|text| ports(&text)).unwrap_or(DEFAULT_PORTS);
        Self::with_ports(target, ports)
    }

    fn with_ports(target: SocketAddr, ports: u32) -> Self {
        Self { target, clients_per_address: (ports - ports.div_ceil(SPARE_SHARE).min(ports)).max(1) }
    }

    pub fn target(&self) -> SocketAddr {
        self.target
    }

    /// The address that a client binds to. `None`: the kernel chooses, which is 127.0.0.1 on loopback, and any other
    /// target is reached from the one address that the route gives.
    fn address(&self, client: u32) -> Option<Ipv4Addr> {
        let further = client / self.clients_per_address;
        match self.target.ip() {
            IpAddr::V4(address) if address.is_loopback() && further > 0 => {
                Some(Ipv4Addr::from(u32::from(Ipv4Addr::LOCALHOST).saturating_add(further)))
            }
            IpAddr::V4(_) | IpAddr::V6(_) => None,
        }
    }

    /// Begins a connection of this client, which epoll reports as writable once it is made. `receive_bytes` bounds what
    /// the kernel receives unread.
    ///
    /// Errors: what the kernel says; `AddrNotAvailable` when no port is left.
    pub fn connect(&self, client: u32, receive_bytes: Option<usize>) -> io::Result<TcpStream> {
        let socket = Socket::new(Domain::for_address(self.target), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_nonblocking(true)?;
        socket.set_tcp_nodelay(true)?;
        if let Some(bytes) = receive_bytes {
            socket.set_recv_buffer_size(bytes)?;
        }
        if let Some(local) = self.address(client) {
            // Without it `bind` looks for a port that nobody uses, whatever the far end; an old kernel does just that.
            let _ = setsockopt(&socket, IpBindAddressNoPort, &true);
            socket.bind(&SockAddr::from(SocketAddr::from((local, 0))))?;
        }
        match socket.connect(&SockAddr::from(self.target)) {
            Err(error) if error.raw_os_error() != Some(rustix::io::Errno::INPROGRESS.raw_os_error()) => Err(error),
            Ok(()) | Err(_) => Ok(socket.into()),
        }
    }
}

/// How many ports the text of the range file names: "first last".
fn ports(text: &str) -> Option<u32> {
    let mut numbers = text.split_whitespace().map(str::parse::<u16>);
    let (first, last) = (numbers.next()?.ok()?, numbers.next()?.ok()?);
    u32::from(last).checked_sub(u32::from(first)).map(|ports| ports + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn loopback() -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, 9_700))
    }

    #[test]
    fn the_range_is_inclusive() {
        assert_eq!(ports("32768\t60999\n"), Some(DEFAULT_PORTS));
        assert_eq!(ports("5 5"), Some(1));
        for bad in ["", "1", "9 1", "a b", "1 70000"] {
            assert_eq!(ports(bad), None, "{bad}");
        }
    }

    #[test]
    fn each_address_has_fewer_clients_than_ports() {
        for range in [1, 2, 64, 1_000, DEFAULT_PORTS] {
            let sources = Sources::with_ports(loopback(), range);
            assert!((1..=range.max(1)).contains(&sources.clients_per_address));
            assert!(range < 2 || sources.clients_per_address < range, "{range}: {sources:?}");
        }
        let sources = Sources::with_ports(loopback(), 1_000);
        let per_address = sources.clients_per_address;
        let addresses = [0, per_address - 1, per_address, 2 * per_address].map(|client| sources.address(client));
        assert_eq!(addresses, [None, None, Some(Ipv4Addr::new(127, 0, 0, 2)), Some(Ipv4Addr::new(127, 0, 0, 3))]);
    }

    #[test]
    fn only_loopback_has_further_addresses() {
        for target in ["192.0.2.1:1", "[::1]:1"] {
            assert_eq!(Sources::with_ports(target.parse().unwrap(), 10).address(u32::MAX), None);
        }
    }

    #[test]
    fn a_client_beyond_the_range_comes_from_the_next_address() {
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let sources = Sources::with_ports(listener.local_addr().unwrap(), 2);
        let streams = [0, 1, 2].map(|client| sources.connect(client, None).unwrap());
        let far = [(); 3].map(|()| listener.accept().unwrap().1.ip());
        assert_eq!(far, [1, 2, 3].map(|last| IpAddr::from([127, 0, 0, last])));
        drop(streams);
    }
}
