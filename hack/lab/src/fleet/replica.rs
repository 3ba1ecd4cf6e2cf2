//! One `ebb controller` process, and what it tells of itself.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::Context as _;

use crate::cluster::{Program, Signal};
use crate::demo::traffic;

/// Longest wait for it to serve, and then to lead.
const LIMIT: Duration = Duration::from_secs(60);
/// How often it is asked.
const LOOK: Duration = Duration::from_millis(20);
const HEALTH_PORT: u16 = 8080;
const EXTENDER_PORT: u16 = 9444;

/// A running controller. Clones are handles on the same process.
#[derive(Clone)]
pub struct Replica {
    /// Its process.
    pub program: Program,
    /// Its address.
    pub ip: IpAddr,
}

/// Binds of pods with GPU memory, by how they ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Binds {
    /// To the node and GPUs that were held.
    pub planned: u64,
    /// To others.
    pub elsewhere: u64,
    /// Not at all; tried again.
    pub refused: u64,
}

impl std::ops::AddAssign for Binds {
    fn add_assign(&mut self, other: Self) {
        self.planned += other.planned;
        self.elsewhere += other.elsewhere;
        self.refused += other.refused;
    }
}

impl Binds {
    /// All of them.
    #[must_use]
    pub fn all(self) -> u64 {
        self.planned + self.elsewhere + self.refused
    }
}

impl Replica {
    pub(super) fn new(program: Program, ip: IpAddr) -> Self {
        Self { program, ip }
    }

    /// Where kube-scheduler asks it.
    #[must_use]
    pub fn extender(&self) -> SocketAddr {
        SocketAddr::new(self.ip, EXTENDER_PORT)
    }

    /// Waits until it says that it is ready.
    ///
    /// # Errors
    /// When it does not, or ends; with the end of its log.
    pub async fn serves(&self) -> anyhow::Result<()> {
        self.until("serve", || async {
            self.get("/readyz").await.is_ok_and(|text| text.trim() == "ok")
        })
        .await
    }

    /// Waits until it leads and has caught up with earlier leaders.
    ///
    /// # Errors
    /// When it does not, or ends; with the end of its log.
    pub async fn leads(&self) -> anyhow::Result<()> {
        self.until("lead", || async { self.is_leading().await }).await
    }

    /// Whether it says that it leads.
    pub async fn is_leading(&self) -> bool {
        self.figure("ebb_leader").await.is_ok_and(|value| value == 1)
    }

    /// How the binds that it was asked for ended.
    ///
    /// # Errors
    /// When it does not say.
    pub async fn binds(&self) -> anyhow::Result<Binds> {
        let text = self.get("/metrics").await?;
        let count = |result: &str| figure(&text, &format!("ebb_extender_binds_total{{result=\"{result}\"}}"));
        Ok(Binds {
            planned: count("Planned")?,
            elsewhere: count("Elsewhere")?,
            refused: count("Refused")?,
        })
    }

    /// Ends it as the kernel does for lack of memory.
    ///
    /// # Errors
    /// When it has ended.
    pub async fn kill(&self) -> anyhow::Result<()> {
        self.program.kill(Signal::SIGKILL)?;
        self.program.wait().await;
        Ok(())
    }

    async fn figure(&self, name: &str) -> anyhow::Result<u64> {
        figure(&self.get("/metrics").await?, name)
    }

    async fn get(&self, path: &str) -> anyhow::Result<String> {
        let address = SocketAddr::new(self.ip, HEALTH_PORT);
        let limit = Duration::from_secs(5);
        let answer = traffic::send(address, http::Method::GET, path, None, limit).await?;
        anyhow::ensure!(answer.status.is_success(), "{path}: {}", answer.status);
        Ok(String::from_utf8_lossy(&answer.body).into_owned())
    }

    async fn until<F: Future<Output = bool>>(&self, what: &str, is: impl Fn() -> F) -> anyhow::Result<()> {
        let deadline = Instant::now() + LIMIT;
        while !is().await {
            anyhow::ensure!(
                self.program.ended().is_none() && Instant::now() < deadline,
                "{} did not {what}; the end of its log:\n{}",
                self.program.name(),
                self.program.log_tail()
            );
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }
}

fn figure(text: &str, name: &str) -> anyhow::Result<u64> {
    let value = text
        .lines()
        .filter_map(|line| line.strip_prefix(name)?.strip_prefix(' '))
        .next();
    let value = value.with_context(|| format!("the controller tells no {name}"))?;
    Ok(value.trim().parse()?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn figures_are_found_by_their_whole_name() {
        let text = "# HELP ebb_leader 1\nebb_leader_changes_total 3\nebb_leader 1\n\
                    ebb_extender_binds_total{result=\"Planned\"} 7\n# EOF\n";
        assert_eq!(figure(text, "ebb_leader").unwrap(), 1);
        assert_eq!(
            figure(text, "ebb_extender_binds_total{result=\"Planned\"}").unwrap(),
            7
        );
        assert!(figure(text, "ebb").is_err());
    }
}
