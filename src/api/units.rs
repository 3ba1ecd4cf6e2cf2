//! Quantities with a unit: a bare integer or string says too little.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A number of bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Bytes(pub u64);

impl Bytes {
    /// The largest quantity Ebb takes: 2⁶² bytes. Kubernetes itself accepts up to 2⁶³, which overflows in sums.
    pub const MAX: Bytes = Bytes(1 << 62);

    /// `self − other`, or 0 where that would be negative.
    #[must_use]
    pub const fn saturating_sub(self, other: Bytes) -> Bytes {
        Bytes(self.0.saturating_sub(other.0))
    }

    /// `self + other`, at most `u64::MAX`.
    #[must_use]
    pub const fn saturating_add(self, other: Bytes) -> Bytes {
        Bytes(self.0.saturating_add(other.0))
    }
}

impl std::iter::Sum for Bytes {
    fn sum<I: Iterator<Item = Bytes>>(iter: I) -> Bytes {
        iter.fold(Bytes(0), Bytes::saturating_add)
    }
}

/// In GiB with one decimal, or MiB below 1 GiB, as people read it: `11.2 GiB`.
impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const MIB: u64 = 1 << 20;
        const GIB: u64 = 1 << 30;
        #[expect(clippy::cast_precision_loss, reason = "one decimal is shown")]
        let value = self.0 as f64;
        if self.0 >= GIB {
            let tenths = (value / GIB as f64 * 10.0).round();
            if tenths % 10.0 == 0.0 {
                write!(f, "{:.0} GiB", tenths / 10.0)
            } else {
                write!(f, "{:.1} GiB", tenths / 10.0)
            }
        } else if self.0 >= MIB {
            write!(f, "{:.0} MiB", value / MIB as f64)
        } else {
            write!(f, "{} B", self.0)
        }
    }
}

/// Why a text is no quantity of bytes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QuantityError {
    /// Not of the form number + optional suffix.
    #[error("`{0}` is not a quantity: write bytes as 18Gi, 17.5Gi, 18G or 19327352832")]
    Syntax(String),
    /// A fraction of a byte remains.
    #[error("`{0}` is not a whole number of bytes")]
    Fraction(String),
    /// Negative or more than [`Bytes::MAX`].
    #[error("`{0}` is out of range: between 0 and 4Ei")]
    Range(String),
}

/// Kubernetes' `Quantity` notation: `Ki … Ei`, `n u m k M G T P E`, `e`-exponents, decimals.
impl FromStr for Bytes {
    type Err = QuantityError;

    fn from_str(text: &str) -> Result<Bytes, QuantityError> {
        quantity(text, 0, Remainder::Refused).map(Bytes)
    }
}

/// Thousandths of a CPU core.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MilliCpu(pub u64);

/// The same notation, counted in cores (`500m`, `2`, `0.25`); a part of a thousandth counts as a whole one, as in
/// Kubernetes.
impl FromStr for MilliCpu {
    type Err = QuantityError;

    fn from_str(text: &str) -> Result<MilliCpu, QuantityError> {
        quantity(text, 3, Remainder::RoundedUp).map(MilliCpu)
    }
}

/// What becomes of a part of a unit.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Remainder {
    Refused,
    RoundedUp,
}

/// Reads a quantity in units of 10^−`scale`.
fn quantity(text: &str, scale: i32, remainder: Remainder) -> Result<u64, QuantityError> {
    let syntax = || QuantityError::Syntax(text.to_owned());
    let range = || QuantityError::Range(text.to_owned());
    // 2⁶² has 19 digits; a longer text is no quantity anybody means, and the bound keeps the sums below in i128.
    if text.len() > 40 {
        return Err(syntax());
    }
    let split = text
        .find(|c: char| !(c.is_ascii_digit() || matches!(c, '.' | '+' | '-')))
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(split);
    // Powers: value = digits × 2^two × 10^ten.
    let (two, mut ten): (u32, i32) = match suffix {
        "" => (0, 0),
        "Ki" => (10, 0),
        "Mi" => (20, 0),
        "Gi" => (30, 0),
        "Ti" => (40, 0),
        "Pi" => (50, 0),
        "Ei" => (60, 0),
        "n" => (0, -9),
        "u" => (0, -6),
        "m" => (0, -3),
        "k" => (0, 3),
        "M" => (0, 6),
        "G" => (0, 9),
        "T" => (0, 12),
        "P" => (0, 15),
        "E" => (0, 18),
        other => {
            let exponent = other.strip_prefix(['e', 'E']).ok_or_else(syntax)?;
            (0, exponent.parse::<i8>().map_err(|_| syntax())?.into())
        }
    };
    let negative = number.starts_with('-');
    let digits = number.strip_prefix(['+', '-']).unwrap_or(number);
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    if whole.is_empty() && fraction.is_empty()
        || !whole.chars().chain(fraction.chars()).all(|c| c.is_ascii_digit())
    {
        return Err(syntax());
    }
    let mut value: u128 = 0;
    for digit in whole.bytes().chain(fraction.bytes()) {
        value = value
            .checked_mul(10)
            .and_then(|v| v.checked_add(u128::from(digit - b'0')))
            .ok_or_else(range)?;
    }
    ten += scale - i32::try_from(fraction.len()).map_err(|_| syntax())?;
    value = value.checked_mul(1u128 << two).ok_or_else(range)?;
    while ten > 0 && value != 0 {
        value = value.checked_mul(10).ok_or_else(range)?;
        ten -= 1;
    }
    while ten < 0 {
        if remainder == Remainder::Refused && !value.is_multiple_of(10) {
            return Err(QuantityError::Fraction(text.to_owned()));
        }
        value = value.div_ceil(10);
        ten += 1;
    }
    if value > u128::from(Bytes::MAX.0) || (negative && value != 0) {
        return Err(range());
    }
    u64::try_from(value).map_err(|_| range())
}

/// A count of replicas.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Replicas(pub u32);

impl fmt::Display for Replicas {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub std::sync::Arc<str>);

        impl $name {
            /// The text itself.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl From<&str> for $name {
            fn from(text: &str) -> Self {
                Self(text.into())
            }
        }

        // Maps keyed by it are asked with the `&str` that a request carries.
        impl std::borrow::Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

text_id! {
    /// A physical GPU's UUID, as NVML gives it: `GPU-…`.
    GpuId
}
text_id! {
    /// A pod's UID.
    PodUid
}
text_id! {
    /// A node's name.
    NodeName
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn quantities_as_kubernetes_writes_them() {
        for (text, bytes) in [
            ("0", 0),
            ("18Gi", 18 << 30),
            ("17.5Gi", 35 << 29),
            ("18e9", 18_000_000_000),
            ("18E9", 18_000_000_000),
            ("1E", 1_000_000_000_000_000_000),
            ("1.5k", 1500),
            ("1000m", 1),
            ("+5", 5),
            (".5Ki", 512),
            ("-0", 0),
        ] {
            assert_eq!(text.parse::<Bytes>().unwrap(), Bytes(bytes), "{text}");
        }
        for text in [
            "", "Gi", "1.2.3", "18 Gi", "18gi", "0x10", "1e", "--1", "1-", "9e99",
        ] {
            assert!(text.parse::<Bytes>().is_err(), "{text}");
        }
        assert!(matches!("1m".parse::<Bytes>(), Err(QuantityError::Fraction(_))));
        assert!(matches!("-1".parse::<Bytes>(), Err(QuantityError::Range(_))));
        assert!(matches!("8Ei".parse::<Bytes>(), Err(QuantityError::Range(_))));
    }

    #[test]
    fn cores_in_thousandths_rounded_up() {
        for (text, milli) in [
            ("500m", 500),
            ("2", 2000),
            ("0.25", 250),
            ("1n", 1),
            ("1500u", 2),
            ("1k", 1_000_000),
        ] {
            assert_eq!(text.parse::<MilliCpu>().unwrap(), MilliCpu(milli), "{text}");
        }
        assert!("two".parse::<MilliCpu>().is_err());
    }

    proptest! {
        #[test]
        fn plain_integers_come_back(bytes in 0..=Bytes::MAX.0) {
            prop_assert_eq!(bytes.to_string().parse::<Bytes>(), Ok(Bytes(bytes)));
        }

        #[test]
        fn adversarial_text_never_panics(text in "\\PC{0,60}") {
            let _ = text.parse::<Bytes>();
        }
    }
}
