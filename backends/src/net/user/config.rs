//! What a user-mode network is to be like.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::RangeInclusive;

/// The network's first 64 bits in IPv6, of the block for local use (RFC 4193).
pub const IPV6_PREFIX: Ipv6Addr = Ipv6Addr::new(0xfd62, 0x6976, 0x6973, 0x6f72, 0, 0, 0, 0);

/// The smallest MTU that IPv6 allows (RFC 8200, section 5), and the largest that leaves a length field room.
pub const MTU: RangeInclusive<u16> = 1280..=65520;

/// Bits of the network part of the IPv4 network.
pub const PREFIX: RangeInclusive<u8> = 8..=27;

/// The longest host name, in bytes (RFC 1035, section 2.3.4: a label).
pub const HOSTNAME: usize = 63;

/// Settings of a user-mode network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserConfig {
    /// The IPv4 network. Its gateway is host 2, its name server 3, the guest 15.
    pub network: Ipv4Addr,
    /// Bits of the network part: [`PREFIX`].
    pub prefix: u8,
    /// The guest's host name, told by DHCP.
    pub hostname: Option<String>,
    /// The largest IP packet, in bytes: [`MTU`].
    pub mtu: u16,
    /// The guest has IPv6.
    pub ipv6: bool,
    /// Ports of the host that lead to the guest.
    pub forwards: Vec<Forward>,
    /// No way out but for what is forwarded.
    pub restrict: bool,
    /// The gateway's address leads to the host's loopback interface.
    pub host_loopback: bool,
    /// Name servers; none: those of the host's /etc/resolv.conf.
    pub resolvers: Vec<SocketAddr>,
}

/// The protocol of a [`Forward`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// A port of the host that leads to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forward {
    /// Its protocol.
    pub transport: Transport,
    /// Where the host listens.
    pub host: SocketAddr,
    /// The guest's address; none: the one it has by DHCP.
    pub guest: Option<IpAddr>,
    /// The guest's port.
    pub port: u16,
}

impl Default for UserConfig {
    fn default() -> Self {
        Self {
            network: Ipv4Addr::new(10, 0, 2, 0),
            prefix: 24,
            hostname: None,
            mtu: 1500,
            ipv6: true,
            forwards: Vec::new(),
            restrict: false,
            host_loopback: false,
            resolvers: Vec::new(),
        }
    }
}

impl UserConfig {
    /// Its numbers are within their bounds.
    pub fn is_valid(&self) -> bool {
        MTU.contains(&self.mtu)
            && PREFIX.contains(&self.prefix)
            && self.network.to_bits() << self.prefix == 0
            && self.hostname.as_ref().is_none_or(|name| (1..=HOSTNAME).contains(&name.len()))
    }

    fn host(&self, number: u32) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.network.to_bits() + number)
    }

    /// The gateway's IPv4 address.
    pub fn gateway(&self) -> Ipv4Addr {
        self.host(2)
    }

    /// The name server's IPv4 address.
    pub fn dns(&self) -> Ipv4Addr {
        self.host(3)
    }

    /// The guest's IPv4 address.
    pub fn guest(&self) -> Ipv4Addr {
        self.host(15)
    }

    /// The network's mask.
    pub fn mask(&self) -> Ipv4Addr {
        Ipv4Addr::from_bits(!0 << (32 - self.prefix))
    }

    /// The gateway's IPv6 address.
    pub fn gateway6(&self) -> Ipv6Addr {
        Ipv6Addr::from_bits(IPV6_PREFIX.to_bits() | 2)
    }

    /// The gateway's link-local IPv6 address.
    pub fn router6(&self) -> Ipv6Addr {
        Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2)
    }

    /// The name server's IPv6 address.
    pub fn dns6(&self) -> Ipv6Addr {
        Ipv6Addr::from_bits(IPV6_PREFIX.to_bits() | 3)
    }

    /// The network's own Ethernet address.
    pub fn mac(&self) -> [u8; 6] {
        let [a, b, c, d] = self.gateway().octets();
        [0x52, 0x55, a, b, c, d]
    }

    /// The address means everybody in the guest's own network.
    pub fn is_broadcast(&self, address: Ipv4Addr) -> bool {
        address | self.mask() == Ipv4Addr::BROADCAST && self.is_local(address.into())
    }

    /// The address lies in the guest's own network.
    pub fn is_local(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(address) => address & self.mask() == self.network,
            IpAddr::V6(address) => address.segments()[..4] == IPV6_PREFIX.segments()[..4],
        }
    }
}
