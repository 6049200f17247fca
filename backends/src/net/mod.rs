//! Networks: where the guest's network interfaces lead to.

pub mod limit;
mod outlet;
mod segment;
mod spec;
pub mod switch;
pub mod tap;
pub mod user;
mod vnet;

use std::io;
use std::net::SocketAddr;

pub use limit::LimitedPort;
pub use spec::{NetSpec, NetworkSpec};
pub use switch::SwitchPort;
pub use tap::Tap;
pub use user::{Forward, Transport, UserConfig, UserNetwork};

/// Why a network could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// A port of the host's is taken.
    #[error("cannot forward {transport} {address}: another program has that port; choose another one")]
    PortTaken {
        /// tcp or udp.
        transport: &'static str,
        /// Where we would listen.
        address: SocketAddr,
    },
    /// A port of the host's is for root.
    #[error(
        "cannot forward {transport} {address}: ports below 1024 are for privileged programs; choose a higher one"
    )]
    PortPrivileged {
        /// tcp or udp.
        transport: &'static str,
        /// Where we would listen.
        address: SocketAddr,
    },
    /// An address is not the host's.
    #[error(
        "cannot forward {transport} {address}: the host has no such address; say 127.0.0.1, 0.0.0.0 or one of its own"
    )]
    NoSuchAddress {
        /// tcp or udp.
        transport: &'static str,
        /// Where we would listen.
        address: SocketAddr,
    },
    /// The host doesn't let us listen.
    #[error("cannot forward {transport} {address}: {error}")]
    Listen {
        /// tcp or udp.
        transport: &'static str,
        /// Where we would listen.
        address: SocketAddr,
        /// What the host said.
        #[source]
        error: io::Error,
    },
    /// Numbers out of bounds.
    #[error(
        "a user network has an MTU of 1280 to 65520 bytes, 8 to 27 bits of network, and a name of up to 63 bytes"
    )]
    Config,
    /// A switch can't be joined.
    #[error("cannot join the switch {0}: {1}")]
    Switch(String, #[source] io::Error),
    /// The host has no taps.
    #[error(
        "cannot open the tap {0}: /dev/net/tun cannot be opened ({1}); use --net user, or load the module tun"
    )]
    TapDevice(String, #[source] io::Error),
    /// A tap is not ours.
    #[error(
        "cannot open the tap {0}: it is not yours; have it made by root: ip tuntap add {0} mode tap user $USER"
    )]
    TapDenied(String),
    /// Somebody else has the tap.
    #[error("cannot open the tap {0}: another program has it")]
    TapBusy(String),
    /// An interface of this name is something else.
    #[error("cannot open the tap {0}: there is an interface of that name that is no tap with one queue")]
    TapKind(String),
    /// A tap can't be opened.
    #[error("cannot open the tap {0}: {1}")]
    Tap(String, #[source] io::Error),
    /// The host has no descriptors or threads to give.
    #[error("cannot start the network: {0}")]
    Start(#[source] io::Error),
}

impl NetError {
    fn listen(transport: Transport, address: SocketAddr, error: io::Error) -> Self {
        let transport = match transport {
            Transport::Tcp => "tcp",
            Transport::Udp => "udp",
        };
        match error.kind() {
            io::ErrorKind::AddrInUse => Self::PortTaken { transport, address },
            io::ErrorKind::AddrNotAvailable => Self::NoSuchAddress { transport, address },
            io::ErrorKind::PermissionDenied if address.port() < 1024 => {
                Self::PortPrivileged { transport, address }
            }
            _ => Self::Listen { transport, address, error },
        }
    }
}
