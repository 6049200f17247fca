//! The text that says what a network interface leads to, as in `--net user,hostfwd=tcp:127.0.0.1:2222-:22`.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;

use bivisor_machine::packet::PacketPort;

use super::tap::NAME as TAP_NAME;
use super::user::config::{HOSTNAME, MTU, PREFIX};
use super::{Forward, LimitedPort, NetError, SwitchPort, Tap, Transport, UserConfig, UserNetwork};
use crate::rate::RateLimit;

/// The longest name of a switch: its sockets' paths have a limit.
const SWITCH_NAME: usize = 32;

/// The words of rate limits.
const RATES: &str = "out-bytes=, out-packets=, in-bytes=, in-packets= (per second)";

/// A network interface as the user says it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetSpec {
    /// Where it leads to.
    pub network: NetworkSpec,
    /// Its Ethernet address; none: a random one.
    pub mac: Option<[u8; 6]>,
    /// What the guest may send: `out-bytes`, `out-packets`, each per second.
    pub out: RateLimit,
    /// What the guest may get: `in-bytes`, `in-packets`, each per second.
    pub to_guest: RateLimit,
}

/// Where a network interface leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetworkSpec {
    /// A router in user space: `user`.
    User(UserConfig),
    /// An interface of the host's: `tap=NAME`.
    Tap(String),
    /// A switch between the user's machines: `switch=NAME`.
    Switch(String),
}

impl NetSpec {
    /// Opens the network.
    ///
    /// # Errors
    /// What the host does not let us have, in one sentence.
    pub fn open(&self) -> Result<Arc<dyn PacketPort>, NetError> {
        let port: Arc<dyn PacketPort> = match &self.network {
            NetworkSpec::User(config) => Arc::new(UserNetwork::new(config.clone())?),
            NetworkSpec::Tap(name) => Arc::new(Tap::open(name)?),
            NetworkSpec::Switch(name) => Arc::new(SwitchPort::join(name)?),
        };
        if self.out.is_unlimited() && self.to_guest.is_unlimited() {
            return Ok(port);
        }
        Ok(Arc::new(LimitedPort::new(port, self.out, self.to_guest)?))
    }

    /// The largest IP packet, in bytes, if it is not left to the network.
    pub fn mtu(&self) -> Option<u16> {
        match &self.network {
            NetworkSpec::User(config) => Some(config.mtu),
            NetworkSpec::Tap(_) | NetworkSpec::Switch(_) => None,
        }
    }
}

impl FromStr for NetSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut words = text.split(',');
        let network = words.next().unwrap_or_default();
        let mut mac = None;
        let (mut out, mut to_guest) = (RateLimit::default(), RateLimit::default());
        let mut others = Vec::new();
        for word in words {
            let (key, value) = word.split_once('=').map_or((word, None), |(key, value)| (key, Some(value)));
            match (key, value) {
                ("mac", Some(value)) => mac = Some(parse_mac(value)?),
                ("out-bytes", Some(value)) => out.bytes = Some(parse_amount(word, value)?),
                ("out-packets", Some(value)) => out.operations = Some(parse_amount(word, value)?),
                ("in-bytes", Some(value)) => to_guest.bytes = Some(parse_amount(word, value)?),
                ("in-packets", Some(value)) => to_guest.operations = Some(parse_amount(word, value)?),
                _ => others.push((key, value)),
            }
        }
        let network = match network.split_once('=') {
            None if network == "user" => NetworkSpec::User(parse_user(&others)?),
            Some(("tap", name)) => NetworkSpec::Tap(parse_name(network, name, TAP_NAME)?),
            Some(("switch", name)) => NetworkSpec::Switch(parse_name(network, name, SWITCH_NAME)?),
            _ => return Err(format!("'{network}' is no network: say user, tap=NAME or switch=NAME")),
        };
        if let (NetworkSpec::Tap(_) | NetworkSpec::Switch(_), Some((key, _))) = (&network, others.first()) {
            return Err(format!("'{key}' is no option of a tap or switch: say mac= or {RATES}"));
        }
        Ok(Self { network, mac, out, to_guest })
    }
}

fn parse_user(options: &[(&str, Option<&str>)]) -> Result<UserConfig, String> {
    let mut config = UserConfig::default();
    for &(key, value) in options {
        match (key, value) {
            ("hostfwd", Some(value)) => config.forwards.push(parse_forward(value)?),
            ("restrict", value) => config.restrict = parse_switch(key, value)?,
            ("host-loopback", value) => config.host_loopback = parse_switch(key, value)?,
            ("ipv6", value) => config.ipv6 = parse_switch(key, value)?,
            ("net", Some(value)) => (config.network, config.prefix) = parse_network(value)?,
            ("mtu", Some(value)) => config.mtu = parse_mtu(value)?,
            ("hostname", Some(value)) => config.hostname = Some(parse_hostname(value)?),
            ("dns", Some(value)) => config.resolvers.push(parse_resolver(value)?),
            _ => {
                return Err(format!(
                    "'{key}' is no option of a user network: say hostfwd=, restrict, host-loopback=, ipv6=, net=, \
                     mtu=, hostname=, dns=, mac= or {RATES}"
                ));
            }
        }
    }
    Ok(config)
}

/// A name that can be one of a file and of an interface.
fn parse_name(text: &str, name: &str, longest: usize) -> Result<String, String> {
    let fits = !name.is_empty()
        && name.len() <= longest
        && !name.starts_with(['-', '.'])
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
    if fits {
        Ok(name.into())
    } else {
        Err(format!("{text}: say a name of up to {longest} letters, digits, hyphens, underscores and dots"))
    }
}

/// `on`, `off`, or nothing, which means on.
fn parse_switch(key: &str, value: Option<&str>) -> Result<bool, String> {
    match value {
        None | Some("on") => Ok(true),
        Some("off") => Ok(false),
        Some(value) => Err(format!("{key}={value}: say on or off")),
    }
}

fn parse_mac(text: &str) -> Result<[u8; 6], String> {
    let bad = || format!("'{text}' is no Ethernet address of one interface: say one like 52:54:00:12:34:56");
    let bytes: Vec<u8> = text
        .split(':')
        .map(|byte| match byte.as_bytes() {
            [high, low] if high.is_ascii_hexdigit() && low.is_ascii_hexdigit() => {
                u8::from_str_radix(byte, 16).ok()
            }
            _ => None,
        })
        .collect::<Option<_>>()
        .ok_or_else(bad)?;
    let mac: [u8; 6] = bytes.try_into().map_err(|_| bad())?;
    // The lowest bit of the first byte means a group.
    if mac[0] & 1 != 0 || mac == [0; 6] { Err(bad()) } else { Ok(mac) }
}

/// A number above zero, with K, M or G for powers of 1024.
fn parse_amount(word: &str, text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(['K', 'M', 'G']);
    let shift = match &text[digits.len()..] {
        "" => Some(0),
        "K" => Some(10),
        "M" => Some(20),
        "G" => Some(30),
        _ => None,
    };
    let number = digits.parse::<u64>().ok().filter(|number| *number > 0 && !digits.starts_with('+'));
    number
        .zip(shift)
        .and_then(|(number, shift)| number.checked_mul(1 << shift))
        .ok_or_else(|| format!("{word}: say a number above zero, with K, M or G if you like"))
}

fn parse_mtu(text: &str) -> Result<u16, String> {
    text.parse()
        .ok()
        .filter(|mtu| MTU.contains(mtu))
        .ok_or_else(|| format!("mtu={text}: say {} to {} bytes", MTU.start(), MTU.end()))
}

fn parse_hostname(text: &str) -> Result<String, String> {
    let fits = !text.is_empty()
        && text.len() <= HOSTNAME
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
        && !text.starts_with('-')
        && !text.ends_with('-');
    if fits {
        Ok(text.into())
    } else {
        Err(format!("hostname={text}: say up to {HOSTNAME} letters, digits and hyphens"))
    }
}

fn parse_network(text: &str) -> Result<(Ipv4Addr, u8), String> {
    let parse = || {
        let (address, prefix) = text.split_once('/')?;
        let address: Ipv4Addr = address.parse().ok()?;
        let prefix: u8 = prefix.parse().ok().filter(|prefix| PREFIX.contains(prefix))?;
        let usable = !address.is_loopback() && !address.is_multicast() && !address.is_unspecified();
        let whole = address.to_bits() << prefix == 0;
        (usable && whole).then_some((address, prefix))
    };
    parse().ok_or_else(|| {
        format!("net={text}: say the first address and the length of a network, as 10.0.2.0/24 (8 to 27)")
    })
}

fn parse_resolver(text: &str) -> Result<SocketAddr, String> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok(SocketAddr::new(address, 53));
    }
    text.parse().map_err(|_| {
        format!("dns={text}: say the address of a name server, as 192.0.2.1 or [2001:db8::1]:53")
    })
}

/// `tcp:HOST:PORT-GUEST:PORT`: no host address means the loopback interface, no guest address the one by DHCP. IPv6
/// addresses stand in brackets.
fn parse_forward(text: &str) -> Result<Forward, String> {
    let bad = || {
        format!(
            "hostfwd={text}: say tcp or udp, the host's address and port, and the guest's, as tcp:127.0.0.1:2222-:22"
        )
    };
    let (transport, rest) = text.split_once(':').ok_or_else(bad)?;
    let transport = match transport {
        "tcp" => Transport::Tcp,
        "udp" => Transport::Udp,
        _ => return Err(bad()),
    };
    let (host, guest) = rest.split_once('-').ok_or_else(bad)?;
    let (host, host_port) = parse_end(host).ok_or_else(bad)?;
    let (guest, port) = parse_end(guest).ok_or_else(bad)?;
    if port == 0 || guest.is_some_and(|guest| guest.is_unspecified()) {
        return Err(bad());
    }
    let host = host.unwrap_or(match guest {
        Some(IpAddr::V6(_)) => Ipv6Addr::LOCALHOST.into(),
        _ => Ipv4Addr::LOCALHOST.into(),
    });
    Ok(Forward { transport, host: SocketAddr::new(host, host_port), guest, port })
}

/// An address, or none, and a port.
fn parse_end(text: &str) -> Option<(Option<IpAddr>, u16)> {
    let (address, port) = text.rsplit_once(':')?;
    let port = port.parse().ok()?;
    if address.is_empty() {
        return Some((None, port));
    }
    let address = match address.strip_prefix('[').and_then(|inner| inner.strip_suffix(']')) {
        Some(inner) => IpAddr::V6(inner.parse().ok()?),
        None => IpAddr::V4(address.parse().ok()?),
    };
    Some((Some(address), port))
}

impl fmt::Display for Forward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let transport = match self.transport {
            Transport::Tcp => "tcp",
            Transport::Udp => "udp",
        };
        write!(f, "{transport}:{}-", self.host)?;
        match self.guest {
            Some(guest) => write!(f, "{}", SocketAddr::new(guest, self.port)),
            None => write!(f, ":{}", self.port),
        }
    }
}

impl fmt::Display for NetSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.network {
            NetworkSpec::User(config) => write_user(f, config)?,
            NetworkSpec::Tap(name) => write!(f, "tap={name}")?,
            NetworkSpec::Switch(name) => write!(f, "switch={name}")?,
        }
        if let Some([a, b, c, d, e, g]) = self.mac {
            write!(f, ",mac={a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")?;
        }
        for (word, amount) in [
            ("out-bytes", self.out.bytes),
            ("out-packets", self.out.operations),
            ("in-bytes", self.to_guest.bytes),
            ("in-packets", self.to_guest.operations),
        ] {
            if let Some(amount) = amount {
                write!(f, ",{word}={amount}")?;
            }
        }
        Ok(())
    }
}

/// What differs from the default.
fn write_user(f: &mut fmt::Formatter<'_>, config: &UserConfig) -> fmt::Result {
    let default = UserConfig::default();
    write!(f, "user")?;
    for forward in &config.forwards {
        write!(f, ",hostfwd={forward}")?;
    }
    if config.restrict {
        write!(f, ",restrict")?;
    }
    if config.host_loopback {
        write!(f, ",host-loopback=on")?;
    }
    if !config.ipv6 {
        write!(f, ",ipv6=off")?;
    }
    if (config.network, config.prefix) != (default.network, default.prefix) {
        write!(f, ",net={}/{}", config.network, config.prefix)?;
    }
    if config.mtu != default.mtu {
        write!(f, ",mtu={}", config.mtu)?;
    }
    if let Some(name) = &config.hostname {
        write!(f, ",hostname={name}")?;
    }
    for resolver in &config.resolvers {
        write!(f, ",dns={resolver}")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(text: &str) -> UserConfig {
        match text.parse::<NetSpec>().unwrap().network {
            NetworkSpec::User(config) => config,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_plain_user_network_is_the_default() {
        assert_eq!(user("user"), UserConfig::default());
    }

    #[test]
    fn forwards() {
        let forward = |transport, host: &str, guest: Option<&str>, port| Forward {
            transport,
            host: host.parse().unwrap(),
            guest: guest.map(|guest| guest.parse().unwrap()),
            port,
        };
        let config = user(
            "user,hostfwd=tcp:127.0.0.1:2222-:22,hostfwd=udp::5353-10.0.2.9:53,hostfwd=tcp:[::1]:80-[fd00::5]:8080",
        );
        assert_eq!(
            config.forwards,
            [
                forward(Transport::Tcp, "127.0.0.1:2222", None, 22),
                forward(Transport::Udp, "127.0.0.1:5353", Some("10.0.2.9"), 53),
                forward(Transport::Tcp, "[::1]:80", Some("fd00::5"), 8080),
            ]
        );
    }

    #[test]
    fn every_option_is_taken_and_written() {
        let text = "user,hostfwd=tcp:127.0.0.1:2222-:22,restrict,host-loopback=on,ipv6=off,net=192.168.5.0/24,\
                    mtu=9000,hostname=mail,dns=192.0.2.1:53,mac=52:54:00:ab:cd:ef";
        let spec: NetSpec = text.parse().unwrap();
        assert_eq!(spec.mac, Some([0x52, 0x54, 0, 0xab, 0xcd, 0xef]));
        assert_eq!(spec.mtu(), Some(9000));
        assert_eq!(spec.to_string(), text);
        for text in [
            "tap=tap0",
            "switch=office,mac=52:54:00:ab:cd:ef,out-bytes=1000,out-packets=5,in-bytes=7,in-packets=9",
        ] {
            assert_eq!(text.parse::<NetSpec>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn rates_have_units() {
        let spec: NetSpec = "user,out-bytes=10M,in-packets=2K".parse().unwrap();
        assert_eq!(spec.out, RateLimit { bytes: Some(10 << 20), operations: None });
        assert_eq!(spec.to_guest, RateLimit { bytes: None, operations: Some(2048) });
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        for (text, tells) in [
            ("", "'' is no network"),
            ("bridge=br0", "'bridge=br0' is no network"),
            ("user,out-bytes=0", "out-bytes=0: say a number above zero"),
            ("user,in-packets=5X", "in-packets=5X: say a number above zero"),
            ("user,in-bytes=99999999999G", "in-bytes=99999999999G: say a number above zero"),
            ("tap=", "tap=: say a name"),
            ("tap=a-name-too-long-for-linux", "tap=a-name-too-long-for-linux: say a name of up to 15"),
            ("switch=../../etc", "switch=../../etc: say a name"),
            ("switch=lan,restrict", "'restrict' is no option of a tap or switch"),
            ("user,fast", "'fast' is no option"),
            ("user,restrict=maybe", "restrict=maybe: say on or off"),
            ("user,hostfwd=tcp:2222-:22", "hostfwd=tcp:2222-:22: say tcp or udp"),
            ("user,hostfwd=sctp::1-:2", "hostfwd=sctp::1-:2"),
            ("user,hostfwd=tcp::1-:0", "hostfwd=tcp::1-:0"),
            ("user,hostfwd=tcp::66000-:1", "hostfwd=tcp::66000-:1"),
            ("user,net=10.0.2.1/24", "net=10.0.2.1/24"),
            ("user,net=10.0.2.0/28", "net=10.0.2.0/28"),
            ("user,mtu=100", "mtu=100: say 1280 to 65520"),
            ("user,hostname=a_b", "hostname=a_b"),
            ("user,dns=example", "dns=example"),
            ("user,mac=53:54:00:12:34:56", "'53:54:00:12:34:56' is no Ethernet address"),
            ("user,mac=52:54:00:12:34", "'52:54:00:12:34' is no Ethernet address"),
            ("user,mac=+2:54:00:12:34:56", "'+2:54:00:12:34:56' is no Ethernet address"),
        ] {
            let error = text.parse::<NetSpec>().unwrap_err();
            assert!(error.starts_with(tells), "{text}: {error}");
        }
    }
}
