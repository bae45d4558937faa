//! IP addresses as text: one canonical form, no zones, IPv4 never in IPv6 clothes.

use std::{fmt, net::IpAddr, str::FromStr};

use base64::{Engine, engine::general_purpose::STANDARD};
use ipnetwork::IpNetwork;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Text that is not an address that we take.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// Neither IPv4 nor IPv6.
    #[error("{0:?} is not an IP address")]
    Malformed(String),
    /// A zone (`fe80::1%eth0`) means something on one machine only.
    #[error("{0:?} has an IPv6 zone, which no other machine can use")]
    Zone(String),
    /// Prefix length missing, malformed or too large.
    #[error("{0:?} is not a CIDR, for example 10.1.0.0/24")]
    Cidr(String),
}

/// Reads one address; IPv4-mapped IPv6 becomes IPv4, as Go's `net.IP` prints it.
///
/// # Errors
/// The text is no address, or has an IPv6 zone.
pub fn parse_address(text: &str) -> Result<IpAddr, AddressError> {
    if text.contains('%') {
        return Err(AddressError::Zone(text.to_owned()));
    }
    IpAddr::from_str(text)
        .map(|address| address.to_canonical())
        .map_err(|_| AddressError::Malformed(text.to_owned()))
}

/// Reads `address/length`; the length is required.
///
/// # Errors
/// The text is no CIDR, or has an IPv6 zone.
pub fn parse_cidr(text: &str) -> Result<IpNetwork, AddressError> {
    let malformed = || AddressError::Cidr(text.to_owned());
    let (address, length) = text.split_once('/').ok_or_else(malformed)?;
    let address = parse_address(address)?;
    let bits = parse_decimal::<u8>(length).ok_or_else(malformed)?;
    IpNetwork::new(address, bits).map_err(|_| malformed())
}

/// A decimal number without sign or leading zeros: one number has one text.
pub(crate) fn parse_decimal<T: FromStr>(text: &str) -> Option<T> {
    let canonical =
        text.bytes().all(|byte| byte.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
    if canonical { text.parse().ok() } else { None }
}

/// The suffix of an `ip/v1` key: an address, or a prefix when the record has a mask.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AddressOrPrefix {
    /// The address, or the prefix's first one.
    pub address: IpAddr,
    /// Length of the prefix in bits; `None` for a single address.
    pub prefix_bits: Option<u8>,
}

impl AddressOrPrefix {
    /// A single address.
    #[must_use]
    pub fn host(address: IpAddr) -> Self {
        Self {
            address: address.to_canonical(),
            prefix_bits: None,
        }
    }

    /// The range that is meant: a single address is /32 or /128.
    #[must_use]
    pub fn network(&self) -> IpNetwork {
        self.prefix_bits
            .and_then(|bits| IpNetwork::new(self.address, bits).ok())
            .unwrap_or_else(|| IpNetwork::from(self.address))
    }
}

impl From<IpAddr> for AddressOrPrefix {
    fn from(address: IpAddr) -> Self {
        Self::host(address)
    }
}

impl fmt::Display for AddressOrPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.prefix_bits {
            Some(bits) => write!(f, "{}/{bits}", self.address),
            None => self.address.fmt(f),
        }
    }
}

impl FromStr for AddressOrPrefix {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.contains('/') {
            let network = parse_cidr(text)?;
            Ok(Self {
                address: network.ip(),
                prefix_bits: Some(network.prefix()),
            })
        } else {
            parse_address(text).map(Self::host)
        }
    }
}

/// An address that is `""` when absent, as Go writes an empty `net.IP`.
pub(crate) mod optional {
    use super::{Deserialize, Deserializer, IpAddr, Serialize, Serializer, de, parse_address};

    pub fn serialize<S: Serializer>(
        address: &Option<IpAddr>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match address {
            Some(address) => address.to_canonical().serialize(serializer),
            None => serializer.serialize_str(""),
        }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<IpAddr>, D::Error> {
        match Option::<String>::deserialize(deserializer)?.as_deref() {
            None | Some("") => Ok(None),
            Some(text) => parse_address(text).map(Some).map_err(de::Error::custom),
        }
    }
}

/// An address that must be there.
pub(crate) mod required {
    use super::{Deserialize, Deserializer, IpAddr, Serialize, Serializer, de, parse_address};

    pub fn serialize<S: Serializer>(address: &IpAddr, serializer: S) -> Result<S::Ok, S::Error> {
        address.to_canonical().serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<IpAddr, D::Error> {
        parse_address(&String::deserialize(deserializer)?).map_err(de::Error::custom)
    }
}

/// A network mask: base64 of 4 or 16 bytes in JSON, a prefix length here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mask {
    /// Leading one bits.
    pub bits: u8,
    /// False: a mask of 16 bytes.
    pub ipv4: bool,
}

impl Mask {
    /// The mask of a prefix of `address`'s family.
    #[must_use]
    pub fn of(address: IpAddr, bits: u8) -> Self {
        Self {
            bits,
            ipv4: address.is_ipv4(),
        }
    }

    fn to_base64(self) -> String {
        if self.ipv4 {
            let mask = u32::MAX
                .checked_shl(32 - u32::from(self.bits.min(32)))
                .unwrap_or(0);
            STANDARD.encode(mask.to_be_bytes())
        } else {
            let mask = u128::MAX
                .checked_shl(128 - u32::from(self.bits.min(128)))
                .unwrap_or(0);
            STANDARD.encode(mask.to_be_bytes())
        }
    }

    fn from_base64(text: &str) -> Option<Self> {
        let bytes = STANDARD.decode(text).ok()?;
        if let Ok(mask) = <[u8; 4]>::try_from(bytes.as_slice()) {
            let mask = u32::from_be_bytes(mask);
            let bits = mask.leading_ones();
            (mask.count_ones() == bits).then_some(Self {
                bits: u8::try_from(bits).ok()?,
                ipv4: true,
            })
        } else {
            let mask = u128::from_be_bytes(bytes.try_into().ok()?);
            let bits = mask.leading_ones();
            (mask.count_ones() == bits).then_some(Self {
                bits: u8::try_from(bits).ok()?,
                ipv4: false,
            })
        }
    }
}

impl Serialize for Mask {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.to_base64())
    }
}

impl<'de> Deserialize<'de> for Mask {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::from_base64(&text)
            .ok_or_else(|| de::Error::custom(format!("{text:?} is not base64 of a network mask")))
    }
}

/// A CIDR as Cilium writes it in JSON: `{"IP":"10.1.0.0","Mask":"////AA=="}`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cidr(pub IpNetwork);

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct CidrJson {
    #[serde(rename = "IP", with = "required")]
    ip: IpAddr,
    mask: Mask,
}

impl Serialize for Cidr {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        CidrJson {
            ip: self.0.ip(),
            mask: Mask::of(self.0.ip(), self.0.prefix()),
        }
        .serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Cidr {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let json = CidrJson::deserialize(deserializer)?;
        if json.ip.is_ipv4() != json.mask.ipv4 {
            return Err(de::Error::custom(format!(
                "the mask of {} is of the other address family",
                json.ip
            )));
        }
        IpNetwork::new(json.ip, json.mask.bits)
            .map(Self)
            .map_err(de::Error::custom)
    }
}
