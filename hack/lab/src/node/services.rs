//! The cluster's Services as a pod sees them: `/etc/hosts` in place of a cluster
//! DNS, and the `NAME_SERVICE_HOST` variables that a kubelet puts into every container.

use futures::StreamExt;
use k8s_openapi::api::core::v1::Service;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, ResourceExt};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;
use tokio::sync::watch;

/// One Service that has a ClusterIP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceEntry {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its ClusterIP.
    pub ip: String,
    /// Its ports: name (possibly empty), number, protocol.
    pub ports: Vec<(String, i32, String)>,
}

/// All Services with a ClusterIP, by namespace and name.
pub type Table = Arc<Vec<ServiceEntry>>;

/// Follows the cluster's Services; the receiver holds `None` until the first list is complete.
pub fn follow(client: Client) -> (watch::Receiver<Option<Table>>, impl Future<Output = ()> + Send) {
    let (sender, receiver) = watch::channel(None);
    let task = async move {
        let api: Api<Service> = Api::all(client);
        let stream = watcher(api, watcher::Config::default()).default_backoff();
        let mut stream = std::pin::pin!(stream);
        let mut known: BTreeMap<(String, String), ServiceEntry> = BTreeMap::new();
        let mut listed: BTreeMap<(String, String), ServiceEntry> = BTreeMap::new();
        let mut complete = false;
        while let Some(event) = stream.next().await {
            match event {
                Ok(watcher::Event::Init) => listed.clear(),
                Ok(watcher::Event::InitApply(service)) => put(&mut listed, &service),
                Ok(watcher::Event::InitDone) => {
                    known = std::mem::take(&mut listed);
                    complete = true;
                }
                Ok(watcher::Event::Apply(service)) => put(&mut known, &service),
                Ok(watcher::Event::Delete(service)) => {
                    known.remove(&(service.namespace().unwrap_or_default(), service.name_any()));
                }
                Err(error) => tracing::warn!(%error, "watching Services"),
            }
            if complete {
                let table: Vec<ServiceEntry> = known.values().cloned().collect();
                sender.send_if_modified(|current: &mut Option<Table>| {
                    if current.as_ref().is_some_and(|old| **old == table) {
                        return false;
                    }
                    *current = Some(Arc::new(table));
                    true
                });
            }
        }
    };
    (receiver, task)
}

fn put(table: &mut BTreeMap<(String, String), ServiceEntry>, service: &Service) {
    let key = (service.namespace().unwrap_or_default(), service.name_any());
    match entry(service) {
        Some(entry) => table.insert(key, entry),
        None => table.remove(&key),
    };
}

fn entry(service: &Service) -> Option<ServiceEntry> {
    let spec = service.spec.as_ref()?;
    let ip = spec
        .cluster_ip
        .clone()
        .filter(|ip| !ip.is_empty() && ip != "None")?;
    let ports = spec
        .ports
        .iter()
        .flatten()
        .map(|port| {
            let protocol = port.protocol.clone().unwrap_or_else(|| "TCP".to_owned());
            (port.name.clone().unwrap_or_default(), port.port, protocol)
        })
        .collect();
    Some(ServiceEntry {
        namespace: service.namespace()?,
        name: service.name_any(),
        ip,
        ports,
    })
}

/// The content of a pod's `/etc/hosts`.
///
/// Besides the full names it holds the short ones that the search path of a pod's
/// `resolv.conf` would make work: `name.namespace`, and `name` in its own namespace.
pub fn hosts(table: &[ServiceEntry], namespace: &str, hostname: &str, ip: &str) -> String {
    let mut text = "# Written by the node: every Service, in place of a cluster DNS.\n127.0.0.1\tlocalhost\n::1\tlocalhost\n".to_owned();
    if !ip.is_empty() {
        let _ = writeln!(text, "{ip}\t{hostname}");
    }
    for ServiceEntry {
        namespace: ns,
        name,
        ip,
        ..
    } in table
    {
        let _ = write!(
            text,
            "{ip}\t{name}.{ns}.svc {name}.{ns}.svc.cluster.local {name}.{ns}"
        );
        if ns == namespace {
            let _ = write!(text, " {name}");
        }
        text.push('\n');
    }
    text
}

/// The variables that tell a container of `namespace` about Services; without `links`
/// only about the API server.
pub fn environment(table: &[ServiceEntry], namespace: &str, links: bool) -> BTreeMap<String, String> {
    let mut env = BTreeMap::new();
    let master = table
        .iter()
        .filter(|s| s.namespace == "default" && s.name == "kubernetes");
    let own = table.iter().filter(|s| links && s.namespace == namespace);
    for service in master.chain(own) {
        let prefix = service.name.replace('-', "_").to_uppercase();
        let ip = &service.ip;
        let Some((_, first, _)) = service.ports.first() else {
            continue;
        };
        env.insert(format!("{prefix}_SERVICE_HOST"), ip.clone());
        env.insert(format!("{prefix}_SERVICE_PORT"), first.to_string());
        for (index, (name, port, protocol)) in service.ports.iter().enumerate() {
            if !name.is_empty() {
                let name = name.replace('-', "_").to_uppercase();
                env.insert(format!("{prefix}_SERVICE_PORT_{name}"), port.to_string());
            }
            let scheme = protocol.to_lowercase();
            let address = format!("{scheme}://{ip}:{port}");
            if index == 0 {
                env.insert(format!("{prefix}_PORT"), address.clone());
            }
            let link = format!("{prefix}_PORT_{port}_{protocol}");
            env.insert(format!("{link}_PROTO"), scheme);
            env.insert(format!("{link}_PORT"), port.to_string());
            env.insert(format!("{link}_ADDR"), ip.clone());
            env.insert(link, address);
        }
    }
    env
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(namespace: &str, name: &str, ip: &str, port: (&str, i32)) -> ServiceEntry {
        let ports = vec![(port.0.to_owned(), port.1, "TCP".to_owned())];
        ServiceEntry {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            ip: ip.to_owned(),
            ports,
        }
    }

    fn table() -> Vec<ServiceEntry> {
        vec![
            service("default", "kubernetes", "10.96.0.1", ("https", 443)),
            service("default", "vllm-small", "10.96.0.9", ("", 80)),
            service("ml", "chat", "10.96.0.5", ("http", 8000)),
        ]
    }

    #[test]
    fn hosts_hold_full_names_and_short_ones_of_the_own_namespace() {
        let text = hosts(&table(), "ml", "chat-0", "10.77.1.2");
        assert!(text.contains("10.77.1.2\tchat-0\n"));
        assert!(text.contains("10.96.0.5\tchat.ml.svc chat.ml.svc.cluster.local chat.ml chat\n"));
        assert!(text.contains(
            "10.96.0.1\tkubernetes.default.svc kubernetes.default.svc.cluster.local kubernetes.default\n"
        ));
    }

    #[test]
    fn service_links_are_those_of_the_kubelet() {
        let env = environment(&table(), "default", true);
        // A Service called vllm sets VLLM_PORT in the pods beside it: a trap real vLLM falls into.
        assert_eq!(env["VLLM_SMALL_PORT"], "tcp://10.96.0.9:80");
        assert_eq!(env["VLLM_SMALL_PORT_80_TCP_ADDR"], "10.96.0.9");
        assert_eq!(env["KUBERNETES_SERVICE_PORT_HTTPS"], "443");
        assert!(!env.contains_key("CHAT_PORT"));
    }

    #[test]
    fn without_links_only_the_api_server_is_told() {
        let env = environment(&table(), "ml", false);
        assert_eq!(env["KUBERNETES_SERVICE_HOST"], "10.96.0.1");
        assert!(env.keys().all(|key| key.starts_with("KUBERNETES_")));
    }
}
