//! Figures, for people and for machines.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context as _;
use serde::Serialize;

/// A spread above this is said.
const STEADY: f64 = 0.10;

/// What one benchmark came to.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Its name.
    pub bench: &'static str,
    /// The commit that was measured.
    pub commit: String,
    /// The machine it was measured on.
    pub machine: String,
    /// What it was measured beside, and in which version.
    pub peers: BTreeMap<String, String>,
    /// The figures by name.
    pub figures: BTreeMap<&'static str, Figure>,
}

/// One figure.
#[derive(Debug, Serialize)]
pub struct Figure {
    /// The middle of what was measured, or its mean.
    pub value: f64,
    /// `ms`, `%`, or `x` for a ratio.
    pub unit: &'static str,
    /// The range of the middle half, as a part of the value.
    pub spread: f64,
}

impl Report {
    /// A report without figures.
    pub fn new(bench: &'static str, peers: BTreeMap<String, String>) -> Self {
        Self {
            bench,
            commit: std::env::var("EBB_COMMIT").unwrap_or_else(|_| "unknown".to_owned()),
            machine: machine(),
            peers,
            figures: BTreeMap::new(),
        }
    }

    /// Prints the table.
    pub fn print(&self) {
        let peers: Vec<String> = self
            .peers
            .iter()
            .map(|(name, version)| format!("{name} {version}"))
            .collect();
        let beside = if peers.is_empty() { "" } else { " · beside " };
        println!(
            "\n{} · commit {}{beside}{}",
            self.bench,
            self.commit,
            peers.join(", ")
        );
        println!("{}\n", self.machine);
        println!("  {:<38}{:>10}  {:<4}{:>10}", "figure", "value", "", "spread");
        for (name, figure) in &self.figures {
            let unsteady = if figure.spread > STEADY {
                "  more than 10 %"
            } else {
                ""
            };
            println!(
                "  {name:<38}{:>10.2}  {:<4}{:>8.1} %{unsteady}",
                figure.value,
                figure.unit,
                figure.spread * 100.0
            );
        }
        println!("\nThe spread is the range of the middle half of the measurements, as a part of the value.");
    }

    /// Writes the file for machines.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, file: &Path) -> anyhow::Result<()> {
        let text = serde_json::to_string_pretty(self)? + "\n";
        std::fs::write(file, text).with_context(|| format!("writing {}", file.display()))
    }
}

impl Figure {
    /// The mean of `values`, and the range of their middle half.
    pub fn mean(values: &[f64], unit: &'static str) -> Self {
        #[allow(clippy::cast_precision_loss, reason = "some hundred measurements")]
        let value = values.iter().sum::<f64>() / values.len().max(1) as f64;
        let range = quantile(values, 0.75) - quantile(values, 0.25);
        let spread = if value == 0.0 { 0.0 } else { range / value };
        Self { value, unit, spread }
    }

    /// The median of `values`, and the range of their middle half.
    pub fn of(values: &[f64], unit: &'static str) -> Self {
        let value = quantile(values, 0.5);
        let range = quantile(values, 0.75) - quantile(values, 0.25);
        let spread = if value == 0.0 { 0.0 } else { range / value };
        Self { value, unit, spread }
    }

    /// A quantile of `values`, and the range of the middle half of what it is in each tenth of them.
    pub fn at(values: &[f64], at: f64, unit: &'static str) -> Self {
        let value = quantile(values, at);
        let tenth = values.len().div_ceil(10).max(1);
        let tenths: Vec<f64> = values.chunks(tenth).map(|part| quantile(part, at)).collect();
        let range = quantile(&tenths, 0.75) - quantile(&tenths, 0.25);
        let spread = if value == 0.0 { 0.0 } else { range / value };
        Self { value, unit, spread }
    }
}

/// A quantile by linear interpolation; 0 of nothing.
fn quantile(values: &[f64], at: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else {
        return 0.0;
    };
    #[allow(clippy::cast_precision_loss, reason = "some hundred measurements")]
    let place = last as f64 * at;
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "between 0 and the last index"
    )]
    let below = place.floor() as usize;
    let above = (below + 1).min(last);
    sorted[below] + (sorted[above] - sorted[below]) * (place - place.floor())
}

fn machine() -> String {
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info
        .lines()
        .find(|line| line.starts_with("model name"))
        .and_then(|line| line.split(": ").nth(1));
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    format!(
        "{} × {}, Linux {}",
        cpus,
        model.unwrap_or("unknown processor"),
        kernel.trim()
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn quantiles_lie_between_the_values() {
        let values = [4.0, 1.0, 3.0, 2.0, 5.0];
        assert!((quantile(&values, 0.5) - 3.0).abs() < 1e-9);
        assert!((quantile(&values, 0.25) - 2.0).abs() < 1e-9);
        assert!((quantile(&[1.0, 2.0], 0.5) - 1.5).abs() < 1e-9);
        assert!(quantile(&[], 0.5).abs() < 1e-9);
        assert!((Figure::of(&values, "ms").spread - 2.0 / 3.0).abs() < 1e-9);
    }
}
