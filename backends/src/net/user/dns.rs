//! Name servers: whom queries are handed on to, and the names that the network answers for itself.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant, SystemTime};

use smoltcp::wire::{DnsFlags, DnsOpcode, DnsPacket, DnsQueryType, DnsQuestion, DnsRcode};

use super::config::UserConfig;

const RESOLV_CONF: &str = "/etc/resolv.conf";

/// How often the file is looked at again.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// How long the network's own answers may be kept, in seconds.
const OWN_TTL: u32 = 300;

/// The name by which the guest finds its gateway.
const HOST_NAME: &[u8] = b"host.internal";

/// The host's name servers, one of them in use.
pub struct Resolvers {
    fixed: bool,
    list: Vec<SocketAddr>,
    current: usize,
    looked: Option<Instant>,
    changed: Option<SystemTime>,
}

impl Resolvers {
    /// These, or if there are none those of the host.
    pub fn new(fixed: Vec<SocketAddr>) -> Self {
        let mut resolvers =
            Self { fixed: !fixed.is_empty(), list: fixed, current: 0, looked: None, changed: None };
        if !resolvers.fixed {
            // At once: a confined process may not get to see the file later.
            resolvers.look();
        }
        resolvers
    }

    /// The one in use.
    pub fn current(&mut self, now: Instant) -> Option<SocketAddr> {
        if !self.fixed && self.looked.is_none_or(|looked| now >= looked + LOOK_AGAIN) {
            self.looked = Some(now);
            self.look();
        }
        self.list.get(self.current).copied()
    }

    /// This one doesn't answer: the next one's turn. False: there is no other.
    pub fn failed(&mut self, which: SocketAddr) -> bool {
        if self.list.get(self.current) == Some(&which) {
            self.current = (self.current + 1) % self.list.len();
        }
        self.list.len() > 1
    }

    fn look(&mut self) {
        // A file that has become unreadable leaves us with what it said.
        let Ok(changed) = fs::metadata(RESOLV_CONF).and_then(|data| data.modified()) else { return };
        if self.changed == Some(changed) {
            return;
        }
        if let Ok(text) = fs::read_to_string(RESOLV_CONF) {
            self.changed = Some(changed);
            self.list = parse(&text);
            self.current = 0;
        }
    }
}

/// The name servers of a resolv.conf(5).
fn parse(text: &str) -> Vec<SocketAddr> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            if words.next()? != "nameserver" {
                return None;
            }
            // A zone ("%eth0") means a link of the host's, which has no number here.
            let address: IpAddr = words.next()?.parse().ok()?;
            Some(SocketAddr::new(address, 53))
        })
        .collect()
}

/// What a query gets.
pub enum Answer {
    /// A name server is to answer.
    Forward,
    /// This is the answer.
    Own(Vec<u8>),
    /// Nothing: it is no query.
    Ignore,
}

/// Looks at a query (RFC 1035, section 4.1).
pub fn answer(config: &UserConfig, query: &[u8]) -> Answer {
    let Ok(packet) = DnsPacket::new_checked(query) else { return Answer::Ignore };
    if packet.flags().contains(DnsFlags::RESPONSE) {
        return Answer::Ignore;
    }
    let own = packet.opcode() == DnsOpcode::Query && packet.question_count() == 1;
    let question = if own { DnsQuestion::parse(packet.payload()).ok() } else { None };
    let Some((rest, question)) = question else {
        return if config.restrict {
            Answer::Own(reply(query, &[], DnsRcode::Refused, None))
        } else {
            Answer::Forward
        };
    };
    let length = packet.payload().len() - rest.len();
    let question_bytes = &packet.payload()[..length];
    if name(&packet, question.name).as_deref() == Some(HOST_NAME) {
        let address = match question.type_ {
            DnsQueryType::A => Some(IpAddr::V4(config.gateway())),
            DnsQueryType::Aaaa if config.ipv6 => Some(IpAddr::V6(config.gateway6())),
            _ => None,
        };
        return Answer::Own(reply(query, question_bytes, DnsRcode::NoError, address));
    }
    if config.restrict {
        return Answer::Own(reply(query, question_bytes, DnsRcode::Refused, None));
    }
    Answer::Forward
}

/// A name in lower case, with dots; none if it is malformed.
fn name(packet: &DnsPacket<&[u8]>, bytes: &[u8]) -> Option<Vec<u8>> {
    let mut name = Vec::new();
    for label in packet.parse_name(bytes) {
        if !name.is_empty() {
            name.push(b'.');
        }
        name.extend(label.ok()?.to_ascii_lowercase());
        if name.len() > 255 {
            return None;
        }
    }
    Some(name)
}

/// A reply to a query of at least a header's length, with the question and perhaps an address.
fn reply(query: &[u8], question: &[u8], code: DnsRcode, address: Option<IpAddr>) -> Vec<u8> {
    let asked = DnsPacket::new_unchecked(query);
    let mut bytes = vec![0; 12];
    let mut packet = DnsPacket::new_unchecked(&mut bytes[..]);
    packet.set_transaction_id(asked.transaction_id());
    packet.set_opcode(asked.opcode());
    let wanted = asked.flags() & DnsFlags::RECURSION_DESIRED;
    packet.set_flags(DnsFlags::RESPONSE | DnsFlags::RECURSION_AVAILABLE | wanted);
    packet.set_question_count(u16::from(!question.is_empty()));
    packet.set_answer_record_count(u16::from(address.is_some()));
    bytes[3] |= u8::from(code);
    bytes.extend_from_slice(question);
    if let Some(address) = address {
        let (kind, data) = match address {
            IpAddr::V4(address) => (1u16, address.octets().to_vec()),
            IpAddr::V6(address) => (28, address.octets().to_vec()),
        };
        // A pointer to the question's name, class IN.
        bytes.extend([0xc0, 12]);
        bytes.extend(kind.to_be_bytes());
        bytes.extend(1u16.to_be_bytes());
        bytes.extend(OWN_TTL.to_be_bytes());
        bytes.extend((data.len() as u16).to_be_bytes());
        bytes.extend(data);
    }
    bytes
}
