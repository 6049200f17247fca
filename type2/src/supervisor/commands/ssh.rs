//! `bivisor ssh`.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::process::CommandExt;
use std::process::Command;

use bivisor_backends::net::{NetSpec, NetworkSpec, Transport};

use super::super::places::Places;
use super::super::record::Spec;
use super::running;
use crate::config::{Boot, VmConfig};
use crate::error::Failure;
use crate::image::{Image, own_key};
use crate::status;

/// The port of ssh (RFC 4253, section 4.1).
const PORT: u16 = 22;

pub(super) fn run(user: &str, name: &str, command: &[String]) -> Result<u8, Failure> {
    let places = Places::find()?;
    running(&places, name)?;
    let machine = places.machine(name);
    let spec = Spec::of(&machine)?;
    let config = spec.config()?;
    let address = forwarded(&config.nets).ok_or_else(|| {
        let sentence = format!(
            "no port of this host leads to port {PORT} of {name}: give it net = [\"user,hostfwd=tcp:127.0.0.1:2222-:22\"] in {}, then `bivisor down {name}` and `bivisor up`",
            spec.file.display()
        );
        Failure::new(status::CONFIGURATION, sentence)
    })?;
    check_image(&config, name)?;

    let mut ssh = Command::new("ssh");
    let key = own_key::path().map_err(Failure::configuration)?;
    if key.is_file() {
        ssh.arg("-i").arg(key);
    }
    let known = machine.known_hosts();
    ssh.args(["-o", "StrictHostKeyChecking=accept-new", "-o", "LogLevel=ERROR"]);
    ssh.arg("-o").arg(format!("UserKnownHostsFile=\"{}\"", known.display()));
    ssh.args(["-o", &format!("HostKeyAlias={name}"), "-p", &address.port().to_string(), "-l", user]);
    ssh.arg(address.ip().to_string());
    if !command.is_empty() {
        ssh.arg("--").args(command);
    }
    let error = ssh.exec();
    Err(match error.kind() {
        io::ErrorKind::NotFound => Failure::new(
            status::HOST,
            "ssh was not found: install it with `sudo apt-get install openssh-client`",
        ),
        _ => Failure::new(status::HOST, format!("ssh can't be started: {error}")),
    })
}

/// Where on this host a machine's ssh port is.
fn forwarded(nets: &[NetSpec]) -> Option<SocketAddr> {
    let forwards = nets.iter().flat_map(|net| match &net.network {
        NetworkSpec::User(user) => user.forwards.as_slice(),
        NetworkSpec::Tap(_) | NetworkSpec::Switch(_) => &[],
    });
    let mut ports = forwards.filter(|forward| forward.transport == Transport::Tcp && forward.port == PORT);
    let host = ports.find(|forward| forward.host.port() != 0)?.host;
    let ip = match host.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    Some(SocketAddr::new(ip, host.port()))
}

/// An image of which we know that it has no server is told from one that does not answer.
fn check_image(config: &VmConfig, name: &str) -> Result<(), Failure> {
    let Boot::Image(image) = &config.boot else { return Ok(()) };
    let Ok(image) = Image::open(image) else { return Ok(()) };
    let packages = &image.manifest.packages;
    if packages.is_empty() || packages.iter().any(|package| package.starts_with("openssh-server")) {
        return Ok(());
    }
    let sentence = format!(
        "the image {} of {name} has no ssh server: build it with --ssh (build = {{ ssh = true, … }} in its file), or use `bivisor console {name}`",
        image.name
    );
    Err(Failure::new(status::CONFIGURATION, sentence))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_forwarded_port_is_found() {
        let found = |text: &str| forwarded(&[text.parse().unwrap()]).map(|address| address.to_string());
        assert_eq!(found("user,hostfwd=tcp::8080-:80,hostfwd=tcp::2222-:22"), Some("127.0.0.1:2222".into()));
        assert_eq!(found("user,hostfwd=tcp:0.0.0.0:22-:22"), Some("127.0.0.1:22".into()));
        assert_eq!(found("user,hostfwd=tcp:[::]:23-[fd00::5]:22"), Some("[::1]:23".into()));
        for none in ["user", "user,hostfwd=udp::2222-:22", "user,hostfwd=tcp::22-:2222", "switch=a"] {
            assert_eq!(found(none), None, "{none}");
        }
    }
}
