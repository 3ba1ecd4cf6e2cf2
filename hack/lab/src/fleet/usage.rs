//! Memory and processor time of a running program, as the kernel counts them.

use anyhow::Context as _;

use crate::cluster::Program;

/// The kernel counts in this many ticks a second on every platform that Linux still runs on.
const TICKS_PER_SECOND: f64 = 100.0;

/// Memory of a process, in MiB.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Memory {
    /// Resident now.
    pub rss: f64,
    /// The most that ever was.
    pub peak: f64,
}

/// Memory of a program.
///
/// # Errors
/// When it does not run.
pub fn memory(program: &Program) -> anyhow::Result<Memory> {
    let status = read(program, "status")?;
    Ok(Memory {
        rss: mib(&status, "VmRSS:")?,
        peak: mib(&status, "VmHWM:")?,
    })
}

/// Seconds of processor time that a program has had so far.
///
/// # Errors
/// When it does not run.
pub fn cpu_seconds(program: &Program) -> anyhow::Result<f64> {
    ticks(&read(program, "stat")?).map(|ticks| ticks / TICKS_PER_SECOND)
}

fn read(program: &Program, file: &str) -> anyhow::Result<String> {
    let pid = program.pid();
    let pid = pid.with_context(|| format!("{} does not run", program.name()))?;
    Ok(std::fs::read_to_string(format!("/proc/{pid}/{file}"))?)
}

fn mib(status: &str, field: &str) -> anyhow::Result<f64> {
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    let kib: f64 = line
        .and_then(|line| line.split_whitespace().next())
        .with_context(|| format!("no {field} of the process"))?
        .parse()?;
    Ok(kib / 1024.0)
}

/// utime and stime: fields 14 and 15, counted behind the name, which may have spaces.
fn ticks(stat: &str) -> anyhow::Result<f64> {
    let (_, rest) = stat.rsplit_once(')').context("no name in the process's stat")?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let field = |index: usize| -> anyhow::Result<f64> {
        Ok(fields.get(index).context("too few fields in stat")?.parse()?)
    };
    Ok(field(11)? + field(12)?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn memory_is_read_in_mib() {
        assert!((mib("VmHWM:\t  2048 kB\nVmRSS:\t  1024 kB\n", "VmRSS:").unwrap() - 1.0).abs() < 1e-9);
        assert!(mib("Name: ebb\n", "VmRSS:").is_err());
    }

    #[test]
    fn processor_time_is_found_behind_any_name() {
        let stat = "7 (a ) b) S 1 7 7 0 -1 4194560 100 0 0 0 250 50 0 0 20 0 1 0 5 6 7";
        assert!((ticks(stat).unwrap() - 300.0).abs() < 1e-9);
        assert!(ticks("7 (a) S 1").is_err());
    }
}
