//! Durations as people write them: `90s`, `10m`, `1h30m`, `500ms`.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A duration from 0 up to ten years, written as in Go and Kubernetes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Span(pub Duration);

impl Span {
    /// A span of whole seconds.
    #[must_use]
    pub const fn from_secs(seconds: u64) -> Span {
        Span(Duration::from_secs(seconds))
    }
}

/// Why a text is no duration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a duration: write it as 90s, 10m, 1h30m or 500ms")]
pub struct SpanError(String);

const LIMIT: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

impl FromStr for Span {
    type Err = SpanError;

    fn from_str(text: &str) -> Result<Span, SpanError> {
        let error = || SpanError(text.to_owned());
        if text == "0" {
            return Ok(Span(Duration::ZERO));
        }
        let signed: jiff::SignedDuration = text.parse().map_err(|_| error())?;
        let span = Duration::try_from(signed).map_err(|_| error())?;
        if span > LIMIT {
            Err(error())
        } else {
            Ok(Span(span))
        }
    }
}

impl TryFrom<String> for Span {
    type Error = SpanError;

    fn try_from(text: String) -> Result<Span, SpanError> {
        text.parse()
    }
}

impl From<Span> for String {
    fn from(span: Span) -> String {
        span.to_string()
    }
}

/// The shortest exact form: `1h30m`, `90s` becomes `1m30s`.
impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (total, millis) = (self.0.as_secs(), self.0.subsec_millis());
        if total == 0 && millis == 0 {
            return f.write_str("0s");
        }
        for (value, unit) in [
            (total / 3600, "h"),
            (total / 60 % 60, "m"),
            (total % 60, "s"),
            (millis.into(), "ms"),
        ] {
            if value != 0 {
                write!(f, "{value}{unit}")?;
            }
        }
        Ok(())
    }
}

impl JsonSchema for Span {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Span".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "type": "string",
            "maxLength": 32,
            "pattern": r"^(0|([0-9]+(\.[0-9]+)?(ms|s|m|h))+)$",
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn as_people_write_them() {
        for (text, seconds) in [("90s", 90), ("10m", 600), ("1h30m", 5400), ("0", 0), ("0s", 0)] {
            assert_eq!(text.parse::<Span>().unwrap(), Span::from_secs(seconds), "{text}");
        }
        for text in ["", "10", "-5m", "ten minutes", "999999999h"] {
            assert!(text.parse::<Span>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn what_is_printed_reads_back(millis in 0u64..1_000_000_000) {
            let span = Span(Duration::from_millis(millis));
            prop_assert_eq!(span.to_string().parse::<Span>(), Ok(span));
        }
    }
}
