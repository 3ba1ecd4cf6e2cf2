//! The programs of the control plane: where they are found, the flags each is
//! started with, and when each is ready.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};
use serde_json::json;

use super::certificates::{Certificates, FRONT_PROXY};
use super::namespace::{CONTROL_PLANE_IP, POD_RANGE, SERVICE_RANGE};

/// The name that kube-proxy runs under.
pub const PROXY_NODE: &str = "lab-proxy";
const ETCD: &str = "http://127.0.0.1:2379";

/// The folder with the programs: `EBB_CONTROLPLANE` if set, else what `hack/build-controlplane` knows.
///
/// # Errors
/// If they have not been built: there is no network in here to build them with.
pub fn find_programs() -> anyhow::Result<PathBuf> {
    if let Some(dir) = std::env::var_os("EBB_CONTROLPLANE") {
        return Ok(dir.into());
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../build-controlplane");
    let output = Command::new(&script)
        .arg("--no-build")
        .output()
        .with_context(|| format!("running {}", script.display()))?;
    if !output.status.success() {
        bail!(
            "the control plane's programs are missing; run hack/build-controlplane once (about 5 minutes)\n{}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    let dir = String::from_utf8(output.stdout).context("the folder of the programs")?;
    Ok(dir.trim_end().into())
}

/// Where everything of one control plane is.
pub struct ControlPlane<'a> {
    /// The folder with the programs.
    pub programs: &'a Path,
    /// The folder of this cluster.
    pub dir: &'a Path,
    /// Its certificates.
    pub certificates: &'a Certificates,
    /// Further flags for kube-apiserver.
    pub apiserver_flags: &'a [String],
}

impl ControlPlane<'_> {
    fn command<const N: usize>(&self, program: &str, flags: [String; N]) -> Command {
        let mut command = Command::new(self.programs.join(program));
        command.args(flags).current_dir(self.dir);
        // A kubeconfig or proxy of the person who runs this has no meaning in here.
        for variable in [
            "KUBECONFIG",
            "HTTP_PROXY",
            "HTTPS_PROXY",
            "http_proxy",
            "https_proxy",
        ] {
            command.env_remove(variable);
        }
        command
    }

    /// etcd, without fsync: its data does not outlive it anyway.
    #[must_use]
    pub fn etcd(&self) -> Command {
        self.command(
            "etcd",
            [
                format!("--data-dir={}", self.dir.join("etcd").display()),
                format!("--listen-client-urls={ETCD}"),
                format!("--advertise-client-urls={ETCD}"),
                "--listen-peer-urls=http://127.0.0.1:2380".into(),
                "--unsafe-no-fsync".into(),
                "--log-level=warn".into(),
            ],
        )
    }

    /// The API server, with the default admission plugins and NodeRestriction.
    #[must_use]
    pub fn apiserver(&self) -> Command {
        let file = |name: &str| self.certificates.path(name).display().to_string();
        let mut command = self.command(
            "kube-apiserver",
            [
                format!("--etcd-servers={ETCD}"),
                format!("--bind-address={CONTROL_PLANE_IP}"),
                format!("--advertise-address={CONTROL_PLANE_IP}"),
                "--secure-port=6443".into(),
                // The Service `kubernetes` gets its endpoint when the API server is ready.
                "--endpoint-reconciler-type=lease".into(),
                format!("--service-cluster-ip-range={SERVICE_RANGE}"),
                "--authorization-mode=Node,RBAC".into(),
                "--enable-admission-plugins=NodeRestriction".into(),
                "--allow-privileged=true".into(),
                format!("--tls-cert-file={}", file("apiserver.crt")),
                format!("--tls-private-key-file={}", file("apiserver.key")),
                format!("--client-ca-file={}", file("ca.crt")),
                format!("--kubelet-client-certificate={}", file("kubelet-client.crt")),
                format!("--kubelet-client-key={}", file("kubelet-client.key")),
                format!("--requestheader-client-ca-file={}", file("front-proxy-ca.crt")),
                format!("--requestheader-allowed-names={FRONT_PROXY}"),
                "--requestheader-username-headers=X-Remote-User".into(),
                "--requestheader-group-headers=X-Remote-Group".into(),
                "--requestheader-extra-headers-prefix=X-Remote-Extra-".into(),
                format!("--proxy-client-cert-file={}", file(&format!("{FRONT_PROXY}.crt"))),
                format!("--proxy-client-key-file={}", file(&format!("{FRONT_PROXY}.key"))),
                "--service-account-issuer=https://kubernetes.default.svc".into(),
                format!(
                    "--service-account-signing-key-file={}",
                    file("service-account.key")
                ),
                format!("--service-account-key-file={}", file("service-account.pub")),
                "--profiling=false".into(),
            ],
        );
        command.args(self.apiserver_flags);
        command
    }

    /// The controller manager with all default controllers, each under its own ServiceAccount.
    #[must_use]
    pub fn controller_manager(&self) -> Command {
        let file = |name: &str| self.certificates.path(name).display().to_string();
        let kubeconfig = file("controller-manager.kubeconfig");
        self.command(
            "kube-controller-manager",
            [
                format!("--kubeconfig={kubeconfig}"),
                format!("--authentication-kubeconfig={kubeconfig}"),
                format!("--authorization-kubeconfig={kubeconfig}"),
                "--bind-address=127.0.0.1".into(),
                "--use-service-account-credentials=true".into(),
                format!(
                    "--service-account-private-key-file={}",
                    file("service-account.key")
                ),
                format!("--root-ca-file={}", file("ca.crt")),
                format!("--cluster-signing-cert-file={}", file("ca.crt")),
                format!("--cluster-signing-key-file={}", file("ca.key")),
                format!("--cert-dir={}", self.dir.join("controller-manager").display()),
                // There is one of it: no lease to wait for.
                "--leader-elect=false".into(),
                "--kube-api-qps=200".into(),
                "--kube-api-burst=400".into(),
                "--profiling=false".into(),
            ],
        )
    }

    /// The default scheduler with its default profile.
    ///
    /// # Errors
    /// If its configuration cannot be written.
    pub fn scheduler(&self) -> anyhow::Result<Command> {
        let kubeconfig = self.certificates.path("scheduler.kubeconfig");
        let config = self.config(
            "kube-scheduler.yaml",
            &json!({
                "apiVersion": "kubescheduler.config.k8s.io/v1",
                "kind": "KubeSchedulerConfiguration",
                "leaderElection": {"leaderElect": false},
                "clientConnection": {"kubeconfig": kubeconfig, "qps": 200, "burst": 400},
                "enableProfiling": false,
            }),
        )?;
        let kubeconfig = kubeconfig.display();
        Ok(self.command(
            "kube-scheduler",
            [
                format!("--config={config}"),
                format!("--authentication-kubeconfig={kubeconfig}"),
                format!("--authorization-kubeconfig={kubeconfig}"),
                "--bind-address=127.0.0.1".into(),
                format!("--cert-dir={}", self.dir.join("scheduler").display()),
            ],
        ))
    }

    /// kube-proxy in nftables mode. It looks for a Node named [`PROXY_NODE`] when it starts.
    ///
    /// # Errors
    /// If its configuration cannot be written.
    pub fn proxy(&self) -> anyhow::Result<Command> {
        let config = self.config(
            "kube-proxy.yaml",
            &json!({
                "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
                "kind": "KubeProxyConfiguration",
                "mode": "nftables",
                "clientConnection": {
                    "kubeconfig": self.certificates.path("proxy.kubeconfig"),
                    "qps": 50, "burst": 100,
                },
                "hostnameOverride": PROXY_NODE,
                "bindAddress": CONTROL_PLANE_IP,
                "healthzBindAddress": "127.0.0.1:10256",
                "metricsBindAddress": "127.0.0.1:10249",
                // What comes from a pod keeps its source address.
                "detectLocalMode": "ClusterCIDR",
                "clusterCIDR": POD_RANGE,
                // Sysctls of the whole machine: not ours to set.
                "conntrack": {
                    "maxPerCore": 0, "min": 0,
                    "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s",
                },
                "nftables": {"minSyncPeriod": "100ms", "syncPeriod": "30s"},
            }),
        )?;
        Ok(self.command("kube-proxy", [format!("--config={config}")]))
    }

    fn config(&self, file: &str, content: &serde_json::Value) -> anyhow::Result<String> {
        let path = self.dir.join(file);
        std::fs::write(&path, serde_yaml_ng::to_string(content)?)
            .with_context(|| format!("writing {}", path.display()))?;
        Ok(path.display().to_string())
    }
}
