//! A guest: an interface of smoltcp's on a packet port.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use bivisor_backends::net::{Forward, Transport, UserConfig, UserNetwork};
use bivisor_machine::packet::{Offload, PacketPort, PacketReceiver, PortFeatures};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::{dhcpv4, tcp, udp};
use smoltcp::time::Instant as Moment;
use smoltcp::wire::{EthernetAddress, IpCidr, Ipv4Address, Ipv4Cidr};

pub const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// Frames that the guest has room for.
const ROOM: usize = 256;

/// The device's receive queue.
#[derive(Default)]
pub struct Queue {
    frames: Mutex<VecDeque<(Vec<u8>, Offload)>>,
    largest: AtomicUsize,
    /// Each frame of this number is lost, either way; 0: none.
    lose: AtomicUsize,
    passed: AtomicUsize,
    filled: Condvar,
}

impl PacketReceiver for Queue {
    fn receive(&self, frame: &[u8], offload: &Offload) -> bool {
        let mut frames = self.frames.lock().unwrap();
        if frames.len() >= ROOM {
            return false;
        }
        if self.loses() {
            return true;
        }
        self.largest.fetch_max(frame.len(), Ordering::Relaxed);
        frames.push_back((frame.to_vec(), *offload));
        self.filled.notify_one();
        true
    }
}

impl Queue {
    pub fn pop(&self, port: &dyn PacketPort) -> Option<Vec<u8>> {
        let mut frames = self.frames.lock().unwrap();
        let was_full = frames.len() >= ROOM;
        let frame = frames.pop_front();
        drop(frames);
        if was_full {
            port.ready();
        }
        frame.map(|(frame, _)| frame)
    }

    /// Loses one frame of this many from now on, either way.
    pub fn lose(&self, one_of: usize) {
        self.lose.store(one_of, Ordering::Relaxed);
    }

    fn loses(&self) -> bool {
        let one_of = self.lose.load(Ordering::Relaxed);
        one_of != 0 && self.passed.fetch_add(1, Ordering::Relaxed) % one_of == one_of - 1
    }

    /// The largest frame so far, in bytes.
    pub fn largest(&self) -> usize {
        self.largest.load(Ordering::Relaxed)
    }

    pub fn wait(&self, timeout: Duration) {
        let frames = self.frames.lock().unwrap();
        if frames.is_empty() {
            let _ = self.filled.wait_timeout(frames, timeout).unwrap();
        }
    }
}

/// A port of the host's loopback interface, whichever is free, that leads to one of the guest's.
pub fn forward(transport: Transport, port: u16) -> Forward {
    Forward { transport, host: "127.0.0.1:0".parse().unwrap(), guest: None, port }
}

/// A guest with one port of its own forwarded, and the host's address of it.
pub fn forwarded(transport: Transport, port: u16) -> (Guest, SocketAddr) {
    let config = UserConfig { forwards: vec![forward(transport, port)], ..UserConfig::default() };
    let network = Arc::new(UserNetwork::new(config).unwrap());
    let address = network.forwarded()[0];
    (Guest::new(network).configured(), address)
}

/// The wire as smoltcp has it.
pub struct Wire {
    pub port: Arc<dyn PacketPort>,
    pub queue: Arc<Queue>,
    mtu: usize,
    checksums: bool,
}

pub struct Received(Vec<u8>);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

pub struct Sending<'a>(&'a dyn PacketPort, &'a Queue);

impl TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        let mut frame = vec![0; length];
        let result = f(&mut frame);
        if !self.1.loses() {
            self.0.send(&frame, &Offload::default());
        }
        result
    }
}

impl Device for Wire {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sending<'a>;

    fn receive(&mut self, _now: Moment) -> Option<(Received, Sending<'_>)> {
        let frame = self.queue.pop(&*self.port)?;
        Some((Received(frame), Sending(&*self.port, &self.queue)))
    }

    fn transmit(&mut self, _now: Moment) -> Option<Sending<'_>> {
        Some(Sending(&*self.port, &self.queue))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = self.mtu + 14;
        if !self.checksums {
            // What comes is not verified: it may be a part of a checksum only.
            capabilities.checksum.tcp = Checksum::Tx;
        }
        capabilities
    }
}

/// The guest.
pub struct Guest {
    pub wire: Wire,
    pub interface: Interface,
    pub sockets: SocketSet<'static>,
    began: Instant,
}

impl Guest {
    /// A guest with checksums of its own, as a plain network card has it.
    pub fn new(port: Arc<dyn PacketPort>) -> Self {
        Self::with(port, 1500, true)
    }

    /// A guest with another MTU that leaves checksums to its device, or not.
    pub fn with(port: Arc<dyn PacketPort>, mtu: usize, checksums: bool) -> Self {
        Self::build(port, mtu, checksums, MAC)
    }

    /// One of several guests: number 1 has the address 10.0.0.1.
    pub fn numbered(port: Arc<dyn PacketPort>, number: u8) -> Self {
        let mut guest = Self::build(port, 1500, true, [0x52, 0x54, 0, 0, 0, number]);
        guest.set_address(
            Ipv4Cidr::new(Ipv4Address::new(10, 0, 0, number), 24),
            Ipv4Address::new(10, 0, 0, 254),
        );
        guest
    }

    fn build(port: Arc<dyn PacketPort>, mtu: usize, checksums: bool, mac: [u8; 6]) -> Self {
        let queue = Arc::new(Queue::default());
        let accepted = if checksums { PortFeatures::default() } else { port.features() };
        port.attach(Some(queue.clone()), accepted);
        let mut wire = Wire { port, queue, mtu, checksums };
        let mut config = Config::new(EthernetAddress(mac).into());
        config.random_seed = 0x5eed;
        let interface = Interface::new(config, &mut wire, Moment::ZERO);
        Self { wire, interface, sockets: SocketSet::new(vec![]), began: Instant::now() }
    }

    /// A guest that has the address and the route that DHCP would give.
    pub fn configured(mut self) -> Self {
        self.set_address(Ipv4Cidr::new(Ipv4Address::new(10, 0, 2, 15), 24), Ipv4Address::new(10, 0, 2, 2));
        self
    }

    pub fn set_address(&mut self, address: Ipv4Cidr, router: Ipv4Address) {
        self.interface.update_ip_addrs(|addresses| {
            addresses.retain(|known| !matches!(known, IpCidr::Ipv4(_)));
            addresses.push(IpCidr::Ipv4(address)).unwrap();
        });
        self.interface.routes_mut().add_default_ipv4_route(router).unwrap();
    }

    pub fn poll(&mut self) {
        let now = Moment::from_micros(self.began.elapsed().as_micros() as i64);
        self.interface.poll(now, &mut self.wire, &mut self.sockets);
    }

    /// Polls until `done` is true.
    #[track_caller]
    pub fn until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let end = Instant::now() + PATIENCE;
        loop {
            self.poll();
            if done(self) {
                return;
            }
            assert!(Instant::now() < end, "{what}: not within {PATIENCE:?}");
            self.wire.queue.wait(Duration::from_millis(1));
        }
    }

    pub fn tcp(&mut self, buffer: usize) -> SocketHandle {
        let socket = tcp::Socket::new(
            tcp::SocketBuffer::new(vec![0; buffer]),
            tcp::SocketBuffer::new(vec![0; buffer]),
        );
        self.sockets.add(socket)
    }

    pub fn tcp_socket(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    /// Connects; true if it came about.
    pub fn connect(&mut self, handle: SocketHandle, to: (Ipv4Address, u16), from: u16) -> bool {
        let socket = self.sockets.get_mut::<tcp::Socket<'_>>(handle);
        socket.set_ack_delay(None);
        socket.connect(self.interface.context(), to, from).unwrap();
        self.until("connect", |guest| {
            let state = guest.tcp_socket(handle).state();
            state == tcp::State::Established || state == tcp::State::Closed
        });
        self.tcp_socket(handle).state() == tcp::State::Established
    }

    pub fn udp(&mut self, port: u16) -> SocketHandle {
        let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 64], vec![0; 1 << 18]);
        let mut socket = udp::Socket::new(buffer(), buffer());
        socket.bind(port).unwrap();
        self.sockets.add(socket)
    }

    pub fn udp_socket(&mut self, handle: SocketHandle) -> &mut udp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    /// What DHCP says.
    pub fn dhcp(&mut self) -> dhcpv4::Config<'static> {
        let handle = self.sockets.add(dhcpv4::Socket::new());
        let mut found = None;
        self.until("DHCP", |guest| {
            if let Some(dhcpv4::Event::Configured(config)) =
                guest.sockets.get_mut::<dhcpv4::Socket<'_>>(handle).poll()
            {
                found = Some(dhcpv4::Config {
                    server: config.server,
                    address: config.address,
                    router: config.router,
                    dns_servers: config.dns_servers,
                    packet: None,
                });
            }
            found.is_some()
        });
        self.sockets.remove(handle);
        found.unwrap()
    }
}
