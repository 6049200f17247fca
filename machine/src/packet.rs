//! What a network device asks of its host: a port that frames go into and come out of.

use alloc::sync::Arc;

/// What one side left undone in a frame for the other to do (virtio 1.2, 5.1.6, `virtio_net_hdr`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offload {
    /// The TCP or UDP checksum is only that of the pseudo-header: to be computed from the first of these offsets
    /// on, and stored at the second behind it.
    pub checksum: Option<(u16, u16)>,
    /// The checksum was verified.
    pub checksum_valid: bool,
    /// A segment too large for the wire, to be cut.
    pub segment: Option<Segment>,
}

/// How to cut a large segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Its protocol.
    pub kind: SegmentKind,
    /// The payload of each piece, in bytes.
    pub size: u16,
    /// The length of all headers, in bytes.
    pub header: u16,
    /// TCP with explicit congestion notification.
    pub ecn: bool,
}

/// The protocol of a large segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SegmentKind {
    /// TCP over IPv4.
    Tcp4,
    /// TCP over IPv6.
    Tcp6,
}

/// What a port can do beside plain Ethernet frames of up to 1514 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortFeatures {
    /// The guest may leave checksums to the port.
    pub checksum: bool,
    /// The guest may send large TCP segments.
    pub segments: bool,
    /// The port has frames without checksums to give, if the guest takes them.
    pub gives_partial_checksums: bool,
    /// The port has large segments to give, if the guest takes them.
    pub gives_segments: bool,
}

/// The device's side: where frames for the guest go.
pub trait PacketReceiver: Send + Sync {
    /// A frame for the guest, Ethernet header first. False: there is no room now; the frame is still the port's,
    /// which hears of room by [`PacketPort::ready`]. May be called from any thread, but not from inside
    /// [`PacketPort::send`] or [`PacketPort::ready`].
    fn receive(&self, frame: &[u8], offload: &Offload) -> bool;
}

/// A network's side of one interface.
pub trait PacketPort: Send + Sync {
    /// What the port can do.
    fn features(&self) -> PortFeatures;
    /// Connects the device, or none. `accepted` is what it took of [`PacketPort::features`].
    fn attach(&self, receiver: Option<Arc<dyn PacketReceiver>>, accepted: PortFeatures);
    /// A frame from the guest. Never waits: what the network can't take is dropped.
    fn send(&self, frame: &[u8], offload: &Offload);
    /// The device has room again after it had none.
    fn ready(&self) {}
}
