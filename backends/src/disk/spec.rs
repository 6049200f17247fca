//! A disk as the user asks for it: `PATH[,key[=value]]…`.

use std::path::PathBuf;
use std::str::FromStr;

use crate::rate::RateLimit;

/// Format of a disk image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The disk's bytes as they are.
    Raw,
    /// QEMU's "qcow2", versions 2 and 3.
    Qcow2,
}

/// What of a disk's content the host may keep in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheMode {
    /// Writes end in the host's memory; a flush of the guest's brings them to the disk.
    #[default]
    Writeback,
    /// As `Writeback`, but around the host's page cache (`O_DIRECT`) where the file system allows it.
    None,
    /// Each write is on the disk when it ends.
    Writethrough,
    /// Flushes do nothing: what a crash of the host destroys, it destroys.
    Unsafe,
}

/// What happens to a write for which the host has no room.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnFull {
    /// It waits until there is room.
    #[default]
    Pause,
    /// The guest gets an error.
    Error,
}

/// Whether an image may refer to another file for what it does not contain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Backing {
    /// It may not.
    #[default]
    Off,
    /// To files in the image's own folder or below.
    Beside,
    /// To files in this folder or below.
    In(PathBuf),
}

/// A disk as the user asks for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskSpec {
    /// The image's file, or a block device.
    pub path: PathBuf,
    /// Its format; found out if not given.
    pub format: Option<Format>,
    /// The guest may not write.
    pub read_only: bool,
    /// What the guest writes is forgotten at the end.
    pub snapshot: bool,
    /// Caching by the host.
    pub cache: CacheMode,
    /// Whether the image may refer to another.
    pub backing: Backing,
    /// What to do without room.
    pub on_full: OnFull,
    /// Room that the guest discards is given back.
    pub discard: bool,
    /// Limits.
    pub limit: RateLimit,
    /// The serial number that the guest sees: up to 20 printable characters.
    pub serial: String,
}

/// Characters of a serial number at most.
const SERIAL_SIZE: usize = 20;

impl DiskSpec {
    /// A disk with nothing said but its file.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            format: None,
            read_only: false,
            snapshot: false,
            cache: CacheMode::default(),
            backing: Backing::default(),
            on_full: OnFull::default(),
            discard: true,
            limit: RateLimit::default(),
            serial: String::new(),
        }
    }

    /// Sets an option by its word, as it stands behind the path.
    ///
    /// # Errors
    /// It means nothing; a sentence says what would.
    pub fn set(&mut self, key: &str, value: Option<&str>) -> Result<(), String> {
        match key {
            "format" => {
                self.format = match needed(key, value, "raw or qcow2")? {
                    "raw" => Some(Format::Raw),
                    "qcow2" => Some(Format::Qcow2),
                    "auto" => None,
                    other => return Err(unknown(key, other, "raw or qcow2")),
                }
            }
            "readonly" => self.read_only = switch(key, value)?,
            "snapshot" => self.snapshot = switch(key, value)?,
            "discard" => self.discard = switch(key, value)?,
            "cache" => {
                let choices = "writeback, none, writethrough or unsafe";
                self.cache = match needed(key, value, choices)? {
                    "writeback" => CacheMode::Writeback,
                    "none" => CacheMode::None,
                    "writethrough" => CacheMode::Writethrough,
                    "unsafe" => CacheMode::Unsafe,
                    other => return Err(unknown(key, other, choices)),
                }
            }
            "backing" => {
                self.backing = match needed(key, value, "on, off or a folder")? {
                    "off" => Backing::Off,
                    "on" => Backing::Beside,
                    folder => Backing::In(folder.into()),
                }
            }
            "on_full" => {
                self.on_full = match needed(key, value, "pause or error")? {
                    "pause" => OnFull::Pause,
                    "error" => OnFull::Error,
                    other => return Err(unknown(key, other, "pause or error")),
                }
            }
            "bps" => self.limit.bytes = Some(amount(key, value)?),
            "iops" => self.limit.operations = Some(amount(key, value)?),
            "serial" => {
                let text = needed(key, value, "up to 20 characters")?;
                if text.len() > SERIAL_SIZE || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
                    return Err(unknown(key, text, "up to 20 letters, digits or signs"));
                }
                self.serial = text.into();
            }
            other => {
                return Err(format!(
                    "a disk has no option '{other}': there are format, readonly, snapshot, cache, backing, on_full, discard, bps, iops and serial (a comma in a path is written twice)"
                ));
            }
        }
        Ok(())
    }
}

impl FromStr for DiskSpec {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let mut words = split(text).into_iter();
        let path = words.next().filter(|path| !path.is_empty());
        let Some(path) = path else {
            return Err(format!("'{text}' names no disk: say PATH[,format=raw|qcow2][,readonly][,snapshot]"));
        };
        let mut spec = Self::new(path);
        for word in words {
            match word.split_once('=') {
                Some((key, value)) => spec.set(key, Some(value))?,
                None => spec.set(&word, None)?,
            }
        }
        if spec.format == Some(Format::Raw) && spec.backing != Backing::Off {
            return Err("a raw disk has no backing file: leave backing away".into());
        }
        Ok(spec)
    }
}

/// Splits at single commas; two are one that belongs to the word.
fn split(text: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        if character == ',' && characters.next_if_eq(&',').is_none() {
            words.push(String::new());
        } else if let Some(word) = words.last_mut() {
            word.push(character);
        }
    }
    words
}

fn needed<'a>(key: &str, value: Option<&'a str>, choices: &str) -> Result<&'a str, String> {
    value.filter(|value| !value.is_empty()).ok_or_else(|| format!("{key} needs a value: {choices}"))
}

fn unknown(key: &str, value: &str, choices: &str) -> String {
    format!("{key}={value} means nothing: say {choices}")
}

fn switch(key: &str, value: Option<&str>) -> Result<bool, String> {
    match value {
        None | Some("on") => Ok(true),
        Some("off") => Ok(false),
        Some(other) => Err(unknown(key, other, "on or off")),
    }
}

/// A number with K, M or G (powers of 1024).
fn amount(key: &str, value: Option<&str>) -> Result<u64, String> {
    let text = needed(key, value, "a number, as in 50M")?;
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let shift = match &text[digits..] {
        "" => Some(0),
        "K" => Some(10),
        "M" => Some(20),
        "G" => Some(30),
        _ => None,
    };
    let number = text[..digits].parse::<u64>().ok().filter(|&number| number > 0);
    let amount = number.zip(shift).and_then(|(number, shift)| number.checked_mul(1 << shift));
    amount.ok_or_else(|| unknown(key, text, "a number above zero, with K, M or G if you like"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_option_is_understood() {
        let spec: DiskSpec =
            "a,,b.img,format=qcow2,readonly,snapshot=on,cache=none,backing=/base,on_full=error,\
                              discard=off,bps=50M,iops=1000,serial=d-1"
                .parse()
                .unwrap();
        assert_eq!((spec.path, spec.format), (PathBuf::from("a,b.img"), Some(Format::Qcow2)));
        assert!(spec.read_only && spec.snapshot && !spec.discard);
        assert_eq!((spec.cache, spec.backing), (CacheMode::None, Backing::In("/base".into())));
        assert_eq!(spec.on_full, OnFull::Error);
        assert_eq!(spec.limit, RateLimit { bytes: Some(50 << 20), operations: Some(1000) });
        assert_eq!(spec.serial, "d-1");
        assert_eq!("disk".parse(), Ok(DiskSpec::new("disk")));
        assert_eq!("d,backing=on".parse::<DiskSpec>().unwrap().backing, Backing::Beside);
    }

    #[test]
    fn what_means_nothing_is_refused_with_what_would() {
        for (text, part) in [
            ("", "names no disk"),
            (",readonly", "names no disk"),
            ("d,format=vmdk", "raw or qcow2"),
            ("d,format", "needs a value"),
            ("d,readonly=yes", "on or off"),
            ("d,cache=fast", "writethrough"),
            ("d,on_full=cry", "pause or error"),
            ("d,bps=0", "above zero"),
            ("d,iops=5X", "K, M or G"),
            ("d,bps=99999999999G", "K, M or G"),
            ("d,colour=red", "no option 'colour'"),
            ("d,format=raw,backing=on", "no backing file"),
            ("d,serial=123456789012345678901", "up to 20"),
        ] {
            let error = text.parse::<DiskSpec>().unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
