//! Kubernetes quantities, as far as a node reads them: sizes and CPU counts.

/// Parses a quantity (`24Gi`, `500m`, `1e9`, `17.5Gi`) into thousandths of its unit.
///
/// Thousandths, because `500m` of a CPU is the smallest thing a node has to divide; a value
/// below that is rounded up, as the API server does.
///
/// # Errors
/// Names the text that is no quantity.
pub fn milli(text: &str) -> Result<i128, String> {
    let bad = || format!("{text:?} is no quantity: write for example 24Gi, 500m or 16");
    let (negative, unsigned) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let end = unsigned
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(unsigned.len());
    let (number, suffix) = unsigned.split_at(end);
    // (base, exponent) of the suffix, the result being number × base^exponent.
    let (base, exponent): (i128, i32) = match suffix {
        "" => (10, 0),
        "n" => (10, -9),
        "u" => (10, -6),
        "m" => (10, -3),
        "k" => (10, 3),
        "M" => (10, 6),
        "G" => (10, 9),
        "T" => (10, 12),
        "P" => (10, 15),
        "E" => (10, 18),
        "Ki" => (1024, 1),
        "Mi" => (1024, 2),
        "Gi" => (1024, 3),
        "Ti" => (1024, 4),
        "Pi" => (1024, 5),
        "Ei" => (1024, 6),
        other => match other.strip_prefix(['e', 'E']) {
            Some(digits) => (10, digits.parse().map_err(|_| bad())?),
            None => return Err(bad()),
        },
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() {
        return Err(bad());
    }
    let digits: i128 = format!("{whole}{fraction}").parse().map_err(|_| bad())?;
    let places = u32::try_from(fraction.len()).map_err(|_| bad())?;
    let scaled = |value: i128, by: u32| 10_i128.checked_pow(by).and_then(|p| value.checked_mul(p));
    let mut numerator = scaled(digits, 3).ok_or_else(bad)?;
    let mut denominator = scaled(1, places).ok_or_else(bad)?;
    let factor = base.checked_pow(exponent.unsigned_abs()).ok_or_else(bad)?;
    if exponent >= 0 {
        numerator = numerator.checked_mul(factor).ok_or_else(bad)?;
    } else {
        denominator = denominator.checked_mul(factor).ok_or_else(bad)?;
    }
    let value = ceil_div(numerator, denominator);
    Ok(if negative { -value } else { value })
}

/// Parses a size in bytes.
///
/// # Errors
/// Names the text that is no size, or one below zero or beyond 64 bits.
pub fn bytes(text: &str) -> Result<u64, String> {
    u64::try_from(ceil_div(milli(text)?, 1000)).map_err(|_| format!("{text:?} is no size in bytes"))
}

/// Divides and rounds away from zero, for a positive divisor.
pub fn ceil_div(value: i128, by: i128) -> i128 {
    let quotient = value / by;
    if value % by > 0 { quotient + 1 } else { quotient }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn every_suffix_is_read() {
        for (text, expected) in [
            ("24Gi", 24 * 1024 * 1024 * 1024),
            ("17.5Gi", 35 * 512 * 1024 * 1024),
            ("1e3", 1000),
            ("18E9", 18_000_000_000),
            ("2k", 2000),
            ("1", 1),
            ("100m", 1),
        ] {
            assert_eq!(bytes(text).unwrap(), expected, "{text}");
        }
        assert_eq!(milli("500m").unwrap(), 500);
        assert_eq!(milli("2").unwrap(), 2000);
        assert_eq!(milli(".5").unwrap(), 500);
    }

    #[test]
    fn adversarial_texts_are_refused_and_do_not_overflow() {
        for text in [
            "",
            "Gi",
            "1Xi",
            "--1",
            "1e999",
            "9e38",
            "1.2.3",
            "1e",
            "-",
            "99999999999999999999999999999999999999Ei",
        ] {
            assert!(milli(text).is_err(), "{text}");
        }
        assert!(bytes("-1Gi").is_err());
    }
}
