//! The texts that register the extender. Pure: the same names give the same text.
//!
//! Templates rather than serialized types, for the comments in them: who reads a scheduler's configuration wants to know
//! why it is so. What goes into them is of types whose values cannot break YAML.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use base64::Engine as _;

use crate::api::names;

const DEPLOYMENT: &str = include_str!("deployment.yaml");
const CONFIG: &str = include_str!("config.yaml");
/// The controller's extender port in its Service.
const PORT: u16 = 9444;
/// Where the Deployment mounts the client certificate.
const MOUNTED: &str = "/etc/ebb-scheduler-client";

/// A namespace's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace(String);

impl Namespace {
    /// As text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Namespace {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
        let allowed = text.chars().all(|c| inner(c) || c == '-');
        if allowed && text.len() <= 63 && text.starts_with(inner) && text.ends_with(inner) {
            Ok(Self(text.to_owned()))
        } else {
            Err("a namespace has at most 63 of a-z, 0-9 and -, and begins and ends with one of the first two")
        }
    }
}

/// A release of Kubernetes, `v1.36.3`. What distributions put behind it is left off: the scheduler's image has none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Release([u16; 3]);

impl FromStr for Release {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let release = || {
            let version = text.strip_prefix('v').unwrap_or(text);
            let number = version.split(['-', '+']).next()?;
            let parts: Vec<u16> = number.split('.').map(str::parse).collect::<Result<_, _>>().ok()?;
            Some(Self(parts.try_into().ok()?))
        };
        release().ok_or_else(|| format!("`{text}` is no version of Kubernetes, as v1.36.3"))
    }
}

/// The name of a container image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image(String);

impl Image {
    /// The scheduler of a release, as Kubernetes publishes it.
    #[must_use]
    pub fn of(Release([major, minor, patch]): &Release) -> Self {
        Self(format!("registry.k8s.io/kube-scheduler:v{major}.{minor}.{patch}"))
    }
}

impl FromStr for Image {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "._-/:@".contains(c);
        if !text.is_empty()
            && text.starts_with(|c: char| c.is_ascii_alphanumeric())
            && text.chars().all(allowed)
        {
            Ok(Self(text.to_owned()))
        } else {
            Err("an image's name has letters, digits and ._-/:@ only")
        }
    }
}

/// How the cluster's own scheduler finds the Ebb that is installed.
#[derive(Clone, Debug)]
pub struct Installed {
    /// Of the controller's Service: a scheduler on the host's network often cannot resolve the cluster's names.
    pub cluster_ip: IpAddr,
    /// What it shows to the extender, and by what it knows it.
    pub credentials: Credentials,
}

/// Certificates for the extender.
#[derive(Clone, Debug)]
pub enum Credentials {
    /// A folder on the scheduler's machine with `ca.crt`, `tls.crt` and `tls.key`.
    Files(String),
    /// In the configuration itself.
    Inline(Inline),
}

/// PEM texts.
#[derive(Clone)]
pub struct Inline {
    /// Of Ebb's CA.
    pub ca: Vec<u8>,
    /// The client certificate.
    pub certificate: Vec<u8>,
    /// Its key.
    pub key: Vec<u8>,
}

impl fmt::Debug for Inline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Inline(…)")
    }
}

/// A kube-scheduler of Ebb's own: accounts, rights, configuration, Deployment.
#[must_use]
pub fn deployment(namespace: &Namespace, Image(image): &Image, replicas: u8) -> String {
    let config = fill(
        CONFIG,
        &[
            ("lease", names::SCHEDULER),
            ("lease_namespace", &namespace.0),
            ("client", ""),
            ("other_profiles", ""),
            ("address", &format!("{}:{PORT}", host(namespace))),
            ("server_name", &host(namespace)),
            (
                "credentials",
                &credentials(&Credentials::Files(MOUNTED.to_owned())),
            ),
        ],
    );
    let indented: String = config.lines().map(|line| format!("    {line}\n")).collect();
    let values = [
        ("namespace", namespace.as_str()),
        ("image", image),
        ("replicas", &replicas.to_string()),
        ("config", indented.trim_end()),
    ];
    fill(DEPLOYMENT, &values)
}

/// The configuration of the cluster's own scheduler, which keeps its default profile as it is.
#[must_use]
pub fn config(namespace: &Namespace, installed: &Installed, kubeconfig: Option<&str>) -> String {
    let client = kubeconfig.map(|path| format!("clientConnection:\n  kubeconfig: {}\n", quoted(path)));
    let other = format!(
        "  # Everybody else's pods, as before.\n  - schedulerName: {}\n",
        names::DEFAULT_SCHEDULER
    );
    let text = fill(
        CONFIG,
        &[
            ("lease", "kube-scheduler"),
            ("lease_namespace", "kube-system"),
            ("client", &client.unwrap_or_default()),
            ("other_profiles", &other),
            (
                "address",
                &SocketAddr::new(installed.cluster_ip, PORT).to_string(),
            ),
            ("server_name", &host(namespace)),
            ("credentials", &credentials(&installed.credentials)),
        ],
    );
    format!(
        "# For kube-scheduler's --config. Made by `ebb scheduler config`; a scheduler that uses it makes the\n\
         # Deployment {} superfluous: scale that one to 0.\n{text}",
        names::SCHEDULER
    )
}

/// The name that the extender's certificate is good for.
fn host(namespace: &Namespace) -> String {
    format!("{}.{namespace}.svc", names::CONTROLLER)
}

fn credentials(credentials: &Credentials) -> String {
    let base64 = |bytes: &[u8]| base64::engine::general_purpose::STANDARD.encode(bytes);
    let [ca, certificate, key] = match credentials {
        Credentials::Files(folder) => {
            let file = |name: &str| quoted(&format!("{}/{name}", folder.trim_end_matches('/')));
            [
                ("caFile", file("ca.crt")),
                ("certFile", file("tls.crt")),
                ("keyFile", file("tls.key")),
            ]
        }
        Credentials::Inline(inline) => [
            ("caData", base64(&inline.ca)),
            ("certData", base64(&inline.certificate)),
            ("keyData", base64(&inline.key)),
        ],
    };
    [ca, certificate, key]
        .map(|(key, value)| format!("      {key}: {value}\n"))
        .concat()
}

/// As a YAML scalar: plain where that is safe, else as JSON, which YAML reads.
fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-/".contains(c);
    if text.starts_with('/') && text.chars().all(plain) {
        text.to_owned()
    } else {
        serde_json::Value::from(text).to_string()
    }
}

/// Puts values in the place of their `{{name}}`. A name that stands on its line alone brings its own line ends.
fn fill(template: &str, values: &[(&str, &str)]) -> String {
    values.iter().fold(template.to_owned(), |text, (name, value)| {
        text.replace(&format!("{{{{{name}}}}}"), value)
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use serde::Deserialize;
    use serde_json::Value;

    use super::*;

    fn namespace(text: &str) -> Namespace {
        text.parse().unwrap()
    }

    fn documents(text: &str) -> Vec<Value> {
        serde_yaml_ng::Deserializer::from_str(text)
            .map(|document| Value::deserialize(document).unwrap())
            .collect()
    }

    #[test]
    fn the_manifest_is_what_the_program_writes() {
        let written = deployment(
            &namespace(names::NAMESPACE),
            &Image::of(&"v1.36.3".parse().unwrap()),
            1,
        );
        let manifest = include_str!("../../../manifests/scheduler.yaml");
        assert!(
            written == manifest,
            "run `ebb scheduler deployment --kubernetes-version v1.36.3 > manifests/scheduler.yaml`"
        );
    }

    #[test]
    fn nothing_of_a_template_is_left_and_every_name_is_the_one_that_was_given() {
        let text = deployment(
            &namespace("gpu"),
            &"here:5000/scheduler@sha256:ab".parse().unwrap(),
            3,
        );
        assert!(!text.contains("{{") && !text.contains("ebb-system"), "{text}");
        let documents = documents(&text);
        let config = documents
            .iter()
            .find(|document| document["kind"] == "ConfigMap")
            .unwrap();
        let config: Value = serde_yaml_ng::from_str(config["data"]["config.yaml"].as_str().unwrap()).unwrap();
        assert_eq!(config["leaderElection"]["resourceNamespace"], "gpu");
        let extender = &config["extenders"][0];
        assert_eq!(
            extender["urlPrefix"],
            "https://ebb-controller.gpu.svc:9444/scheduler"
        );
        assert_eq!(
            extender["tlsConfig"]["caFile"],
            "/etc/ebb-scheduler-client/ca.crt"
        );
        let deployment = documents
            .iter()
            .find(|document| document["kind"] == "Deployment")
            .unwrap();
        assert_eq!(deployment["spec"]["replicas"], 3);
        assert_eq!(deployment["metadata"]["namespace"], "gpu");
        let container = &deployment["spec"]["template"]["spec"]["containers"][0];
        assert_eq!(container["image"], "here:5000/scheduler@sha256:ab");
    }

    #[test]
    fn the_clusters_own_scheduler_keeps_its_profile_and_dials_an_address() {
        let installed = Installed {
            cluster_ip: "fd00::7".parse().unwrap(),
            credentials: Credentials::Inline(Inline {
                ca: b"ca".to_vec(),
                certificate: b"certificate".to_vec(),
                key: b"key".to_vec(),
            }),
        };
        let text = config(
            &namespace("gpu"),
            &installed,
            Some("/etc/kubernetes/a \"b\": c.conf"),
        );
        let config: Value = serde_yaml_ng::from_str(&text).unwrap();
        assert_eq!(
            config["clientConnection"]["kubeconfig"],
            "/etc/kubernetes/a \"b\": c.conf"
        );
        let names: Vec<&Value> = config["profiles"]
            .as_array()
            .unwrap()
            .iter()
            .map(|p| &p["schedulerName"])
            .collect();
        assert_eq!(names, ["default-scheduler", "ebb-scheduler"]);
        assert!(config["profiles"][0].get("plugins").is_none());
        assert_eq!(
            config["extenders"][0]["urlPrefix"],
            "https://[fd00::7]:9444/scheduler"
        );
        let tls = &config["extenders"][0]["tlsConfig"];
        assert_eq!(
            (&tls["serverName"], &tls["keyData"]),
            (&"ebb-controller.gpu.svc".into(), &"a2V5".into())
        );
    }

    #[test]
    fn names_that_would_break_the_text_are_refused() {
        for wrong in ["", "-a", "a-", "A", "a\nb", "a: b", &"a".repeat(64)] {
            assert!(wrong.parse::<Namespace>().is_err(), "{wrong:?}");
        }
        for wrong in ["", "a b", "a\n", "{{x}}", "-a", "a\"b"] {
            assert!(wrong.parse::<Image>().is_err(), "{wrong:?}");
        }
        assert_eq!("v1.34.1-gke.12+a".parse(), Ok(Release([1, 34, 1])));
        for wrong in ["", "v1.36", "1.36.x", "v1.36.3.4", "latest"] {
            assert!(wrong.parse::<Release>().is_err(), "{wrong:?}");
        }
    }
}
