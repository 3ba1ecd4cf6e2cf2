//! The real kubectl, as the cluster's administrator.

use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

/// What one kubectl command said.
#[derive(Debug, Clone)]
pub struct Output {
    /// What it printed on stdout.
    pub stdout: String,
    /// What it printed on stderr: warnings of admission webhooks are here too.
    pub stderr: String,
    /// How it ended.
    pub status: ExitStatus,
}

impl Output {
    /// Itself if the command succeeded.
    ///
    /// # Errors
    /// With what kubectl said, otherwise.
    pub fn success(self) -> anyhow::Result<Self> {
        if self.status.success() {
            return Ok(self);
        }
        bail!(
            "kubectl ended with {}: {}{}",
            self.status,
            self.stdout,
            self.stderr
        )
    }
}

/// Runs kubectl commands.
#[derive(Debug, Clone)]
pub struct Kubectl {
    program: PathBuf,
    kubeconfig: PathBuf,
    dir: PathBuf,
}

impl Kubectl {
    pub(super) fn new(programs: &Path, kubeconfig: &Path, dir: &Path) -> Self {
        Self {
            program: programs.join("kubectl"),
            kubeconfig: kubeconfig.to_owned(),
            dir: dir.to_owned(),
        }
    }

    /// Runs one command to its end; a command that fails is no error here.
    ///
    /// # Errors
    /// If kubectl cannot be run or takes longer than two minutes.
    pub async fn run(&self, arguments: &[&str], stdin: Option<&str>) -> anyhow::Result<Output> {
        let mut child = Command::new(&self.program)
            .args(arguments)
            .env("KUBECONFIG", &self.kubeconfig)
            // Its discovery cache belongs to this cluster: another one has the same address.
            .env("KUBECACHEDIR", self.dir.join("kubectl-cache"))
            .stdin(if stdin.is_some() {
                Stdio::piped()
            } else {
                Stdio::null()
            })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("starting {}", self.program.display()))?;
        let input = child.stdin.take();
        let feed = async move {
            if let (Some(mut pipe), Some(text)) = (input, stdin) {
                // A kubectl that fails early does not read all of it, and says why itself.
                let _ = pipe.write_all(text.as_bytes()).await;
            }
        };
        let run = async { tokio::join!(feed, child.wait_with_output()).1 };
        let output = tokio::time::timeout(Duration::from_secs(120), run)
            .await
            .with_context(|| format!("kubectl {} did not end in 2 minutes", arguments.join(" ")))?
            .context("waiting for kubectl")?;
        Ok(Output {
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
            status: output.status,
        })
    }
}
