//! What a test asks for and expects: JSON between `%ifdef CONFIG` and `%endif` at the start of its file.

use std::collections::BTreeMap;

use iced_x86::CpuidFeature;
use serde::Deserialize;
use serde_json::Value;

/// The configuration as it stands in the file.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Raw {
    reg_data: BTreeMap<String, Value>,
    memory_regions: BTreeMap<String, Value>,
    memory_data: BTreeMap<String, String>,
    host_features: Vec<String>,
    mode: String,
    env: BTreeMap<String, String>,
}

/// A test's configuration.
#[derive(Debug, Default)]
pub struct Config {
    /// Values of registers at the end, by name; of 64 bits each, least significant first.
    pub registers: BTreeMap<String, Vec<u64>>,
    /// Memory to be mapped: address and size.
    pub regions: Vec<(u64, u64)>,
    /// What memory holds: address and bytes.
    pub memory: Vec<(u64, Vec<u8>)>,
    /// The code is 32-bit code.
    pub is_32bit: bool,
}

/// Why a test is not run.
pub type Skipped = String;

impl Config {
    /// Reads it from the text of a test. `offers`: whether the guest's processor has a feature.
    ///
    /// # Errors
    /// Why the test can't be run.
    pub fn read(text: &str, offers: impl Fn(CpuidFeature) -> bool) -> Result<Self, Skipped> {
        let json = text.split_once("%ifdef CONFIG").and_then(|(_, rest)| rest.split_once("%endif"));
        let (json, _) = json.ok_or("it has no configuration")?;
        let raw: Raw = serde_json::from_str(json).map_err(|error| format!("its configuration: {error}"))?;
        if let Some(name) = raw.env.keys().find(|name| name.contains("REDUCEDPRECISION")) {
            return Err(format!("it expects what {name} does"));
        }
        for feature in &raw.host_features {
            let sets = features(feature).ok_or_else(|| format!("it needs {feature}"))?;
            if !sets.iter().all(|&set| offers(set)) {
                return Err(format!("it needs {feature}, which the guest's processor has not"));
            }
        }
        let mut registers = BTreeMap::new();
        for (name, value) in raw.reg_data {
            registers.insert(name.to_uppercase(), values(&value).ok_or_else(|| bad(&name))?);
        }
        let region = |(address, size): (String, Value)| {
            let size = *values(&size)
                .and_then(|size| size.first().copied())
                .as_ref()
                .ok_or_else(|| bad(&address))?;
            Ok((number(&address).ok_or_else(|| bad(&address))?, size))
        };
        let data = |(address, bytes): (String, String)| {
            let place = number(&address).ok_or_else(|| bad(&address))?;
            Ok((place, hex(&bytes).ok_or_else(|| bad(&address))?))
        };
        Ok(Self {
            registers,
            regions: raw.memory_regions.into_iter().map(region).collect::<Result<_, Skipped>>()?,
            memory: raw.memory_data.into_iter().map(data).collect::<Result<_, Skipped>>()?,
            is_32bit: raw.mode.eq_ignore_ascii_case("32BIT"),
        })
    }
}

fn bad(what: &str) -> Skipped {
    format!("its configuration: {what} is no number")
}

/// A number as Python reads it: decimal or with 0x, underscores between digits.
fn number(text: &str) -> Option<u64> {
    let text = text.trim().replace('_', "");
    match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => match text.strip_prefix('-') {
            Some(digits) => digits.parse::<u64>().ok().map(u64::wrapping_neg),
            None => text.parse().ok(),
        },
    }
}

fn values(value: &Value) -> Option<Vec<u64>> {
    match value {
        Value::String(text) => Some(vec![number(text)?]),
        Value::Number(number) => Some(vec![number.as_u64()?]),
        Value::Array(values) => Some(values.iter().map(self::values).collect::<Option<Vec<_>>>()?.concat()),
        _ => None,
    }
}

/// Numbers in hexadecimal, separated by blanks, each least significant byte first in memory.
fn hex(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    for number in text.split_whitespace() {
        let digits = number.strip_prefix("0x").unwrap_or(number);
        for end in (1..=digits.len()).rev().step_by(2) {
            bytes.push(u8::from_str_radix(digits.get(end.saturating_sub(2)..end)?, 16).ok()?);
        }
    }
    Some(bytes)
}

/// What a named feature is made of; `None` where no processor that a guest may have has it.
fn features(name: &str) -> Option<&'static [CpuidFeature]> {
    use CpuidFeature as F;
    Some(match name.to_uppercase().as_str() {
        "3DNOW" => &[F::D3NOW, F::D3NOWEXT],
        "SSE4A" => &[F::SSE4A],
        // The tests mean both.
        "AVX" => &[F::AVX, F::AVX2],
        "RAND" => &[F::RDRAND, F::RDSEED],
        "SHA" => &[F::SHA],
        "CLZERO" => &[F::CLZERO],
        "BMI1" => &[F::BMI1],
        "BMI2" => &[F::BMI2],
        "CLWB" => &[F::CLWB],
        "AES256" => &[F::VAES],
        "SSSE3" => &[F::SSSE3],
        "SSE4.1" => &[F::SSE4_1],
        "SSE4.2" => &[F::SSE4_2],
        "AES" => &[F::AES],
        "PCLMUL" => &[F::PCLMULQDQ],
        "MOVBE" => &[F::MOVBE],
        "ADX" => &[F::ADX],
        "XSAVE" => &[F::XSAVE],
        "RDPID" => &[F::RDPID],
        "CLFLOPT" => &[F::CLFLUSHOPT],
        "FSGSBASE" => &[F::FSGSBASE],
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configurations_are_read() {
        let text = r#"
            %ifdef CONFIG
            { "RegData": { "RAX": "0xFFFF_0003", "XMM0": ["0x1", "2"] }, "Mode": "32BIT",
              "MemoryRegions": { "0x1000": "4096" }, "MemoryData": { "0x1000": "0x123 45" } }
            %endif
            hlt"#;
        let config = Config::read(text, |_| true).expect("it can be run");
        assert_eq!(config.registers["RAX"], [0xffff_0003]);
        assert_eq!(config.registers["XMM0"], [1, 2]);
        assert_eq!((config.regions, config.is_32bit), (vec![(0x1000, 4096)], true));
        assert_eq!(config.memory, [(0x1000, vec![0x23, 0x01, 0x45])]);
        assert!(Config::read("hlt", |_| true).is_err());
        let needs = r#"%ifdef CONFIG { "HostFeatures": ["AVX"] } %endif"#;
        assert!(Config::read(needs, |_| false).is_err());
    }
}
