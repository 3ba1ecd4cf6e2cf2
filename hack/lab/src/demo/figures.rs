//! What the story came to, in numbers.

use std::time::{Duration, Instant};

use super::observe::{State, What};
use super::timeline::{Timeline, gib, seconds, short, short_uuid};
use super::traffic::Tally;

/// Times that were taken on the way.
#[derive(Debug)]
pub struct Times {
    /// When the first GPU node was there.
    pub start: Instant,
    /// First request to a sleeping model, sent → pod bound, node there.
    pub bound: Duration,
    /// The same request, sent → first byte.
    pub first_byte: Duration,
    /// Of 100 requests at once, the last answer.
    pub burst: Duration,
    /// First request with no node at all, sent → first byte.
    pub first_byte_without_node: Duration,
}

/// Prints the closing figures.
///
/// # Errors
/// When a bind promised more of a GPU than it has.
pub fn print(timeline: &Timeline, state: &State, tally: &Tally, times: &Times) -> anyhow::Result<()> {
    state.check_reservations()?;
    let row = |name: &str, value: String| timeline.line(&format!("  {name:<44}{value}"));
    let (sent, answered) = (tally.sent(), tally.answered());
    row(
        "requests sent, answered, lost",
        format!("{sent}, {answered}, {}", sent - answered),
    );
    row("wakes", wakes(state));
    row("first request → pod bound", seconds(times.bound));
    row(
        "first request → first byte, load included",
        seconds(times.first_byte),
    );
    row("100 requests at once → the last answer", seconds(times.burst));
    row(
        "request with no node → first byte",
        seconds(times.first_byte_without_node),
    );
    row(
        "binds checked against the GPU's memory",
        state.binds.len().to_string(),
    );
    for (uuid, peak) in state.peaks() {
        let usable = state.usable.get(&uuid).copied().unwrap_or(peak).max(1);
        row(
            &format!("  highest reservation of {}", short_uuid(&uuid)),
            format!(
                "{} of {}, {} %",
                gib(peak),
                gib(usable),
                u128::from(peak) * 100 / u128::from(usable)
            ),
        );
    }
    let now = Instant::now();
    let (used, whole) = (state.gpu_node_seconds(now), (now - times.start).as_secs_f64());
    row("GPU nodes used", state.gpu_nodes.len().to_string());
    row(
        "GPU-node seconds used, of a node always on",
        format!("{used:.0} of {whole:.0}, {:.0} saved", whole - used),
    );
    anyhow::ensure!(sent == answered, "{} requests were not answered", sent - answered);
    Ok(())
}

fn wakes(state: &State) -> String {
    let mut counts: Vec<(String, usize)> = Vec::new();
    for moment in &state.moments {
        let What::Scaled {
            workload, from: 0, ..
        } = &moment.what
        else {
            continue;
        };
        if !workload.starts_with("models/") {
            continue;
        }
        match counts.iter_mut().find(|(name, _)| name == workload) {
            Some((_, count)) => *count += 1,
            None => counts.push((workload.clone(), 1)),
        }
    }
    let words: Vec<String> = counts
        .iter()
        .map(|(name, n)| format!("{} {n}", short(name)))
        .collect();
    words.join(", ")
}
