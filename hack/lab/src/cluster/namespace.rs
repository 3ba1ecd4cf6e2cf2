//! The addresses of the cluster inside its network namespace.
//!
//! There is one interface, `lo`, and everything is local to it: a process can
//! listen on any address of the pod range, which is what gives pods IPs of
//! their own, and a connection to a ClusterIP passes kube-proxy's rules on its
//! way out through `lo`.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::process::Command;

use anyhow::{Context, bail};

/// The address of the control plane, and of the node it would be.
pub const CONTROL_PLANE_IP: &str = "10.77.0.1";
/// Every address in it can be listened on: nodes and pods.
pub const POD_RANGE: &str = "10.77.0.0/16";
/// The ClusterIPs.
pub const SERVICE_RANGE: &str = "10.96.0.0/16";
/// The ClusterIP of the Service `kubernetes`.
pub const KUBERNETES_SERVICE_IP: &str = "10.96.0.1";

/// The addresses, as long as it lives; one at a time in a network namespace.
#[derive(Debug)]
pub struct Namespace {
    // Abstract socket names belong to the network namespace, and go with the process: a lock that
    // cannot be left behind.
    _turn: UnixListener,
}

impl Namespace {
    /// Sets addresses and routes up.
    ///
    /// # Errors
    /// Outside of `hack/isolate`, if the namespace holds a cluster already, or if `ip` fails.
    pub fn set_up() -> anyhow::Result<Self> {
        if std::env::var_os("EBB_ISOLATED").is_none() {
            bail!(
                "a cluster needs namespaces of its own, so that it disturbs nothing and leaves nothing behind: \
                 run this command through hack/isolate (cargo test and cargo run already do)"
            );
        }
        let name = SocketAddr::from_abstract_name("ebb-lab-cluster").context("naming a socket")?;
        let turn = UnixListener::bind_addr(&name).context(
            "this network namespace already holds a cluster; start another one with its own hack/isolate",
        )?;
        ip("link set lo up")?;
        ip(&format!("addr replace {CONTROL_PLANE_IP}/32 dev lo"))?;
        ip(&format!("route replace local {POD_RANGE} dev lo"))?;
        ip(&format!(
            "route replace {SERVICE_RANGE} dev lo src {CONTROL_PLANE_IP}"
        ))?;
        Ok(Self { _turn: turn })
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // The next cluster in this namespace shall not start with this one's Services. Addresses and
        // routes would be the same again.
        for family in ["ip", "ip6"] {
            let _ = Command::new("nft")
                .args(["delete", "table", family, "kube-proxy"])
                .output();
        }
        let _ = Command::new("conntrack").arg("-F").output();
    }
}

fn ip(arguments: &str) -> anyhow::Result<()> {
    let output = Command::new("ip")
        .args(arguments.split(' '))
        .output()
        .context("running ip; on Debian: apt-get install iproute2")?;
    if !output.status.success() {
        bail!(
            "ip {arguments}: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}
