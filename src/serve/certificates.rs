//! The controller's own certificates: made by the program, kept in Secrets so that all replicas use the same, renewed
//! long before they end, and replaced in the running servers without a restart.
//!
//! | object | holds | read by |
//! |---|---|---|
//! | Secret `ebb-serving` | CA with its key, serving certificate with its key | controller |
//! | Secret `ebb-scheduler-client` | CA, client certificate with its key | kube-scheduler, for the extender |
//! | ConfigMap `ebb-ca` | CA | gates |
//!
//! Any replica may write any of them: a create that finds the object there, or an update of a version that has passed,
//! reads again and takes what it finds. Everything is looked at again by time; there is no file to watch.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::pki::{self, Identity, Leaf, PkiError};
use super::tls::{self, ClientAuth, ClientTls, ServerTls};
use crate::api::names;

/// How often the Secrets are looked at again.
const AGAIN: Duration = Duration::from_secs(60);
/// How soon after a failure.
const RETRY: Duration = Duration::from_secs(5);
/// Attempts of a conditional write before the failure is told.
const ATTEMPTS: usize = 10;
/// Common name of the certificate that the scheduler shows to the extender.
pub const SCHEDULER_CLIENT: &str = "ebb-scheduler";

/// CA and serving certificate, as the Secret holds them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Material {
    /// The CA (after a renewal: the new certificate, then the old one) and its key.
    pub ca: Identity,
    /// The serving certificate, which is also good as a client.
    pub serving: Identity,
}

impl Material {
    /// A new CA and a certificate of it.
    fn new(names: &[String], now: SystemTime) -> Result<Self, PkiError> {
        let ca = pki::new_ca(now)?;
        let serving = pki::new_leaf(&ca, &Leaf::Server(names.to_vec()), now)?;
        Ok(Self { ca, serving })
    }

    /// What has to stand in place of this, or `None` when it is good as it is.
    fn renewed(&self, names: &[String], now: SystemTime) -> Result<Option<Self>, PkiError> {
        if !pki::is_key_of(&self.ca.key, &self.ca.certificate) {
            return Ok(Some(Self::new(names, now)?));
        }
        if pki::is_due(&self.ca.certificate, &[], now) {
            let mut next = Self::new(names, now)?;
            // Those who still hold certificates of the old CA are trusted until they have new ones.
            next.ca.certificate.push_str(pki::first_pem(&self.ca.certificate));
            next.ca.certificate.push('\n');
            return Ok(Some(next));
        }
        let good = !pki::is_due(&self.serving.certificate, names, now)
            && pki::is_signed_by(&self.serving.certificate, &self.ca.certificate)
            && pki::is_key_of(&self.serving.key, &self.serving.certificate);
        if good {
            return Ok(None);
        }
        Ok(Some(Self {
            ca: self.ca.clone(),
            serving: pki::new_leaf(&self.ca, &Leaf::Server(names.to_vec()), now)?,
        }))
    }

    fn read(secret: &Secret) -> Option<Self> {
        let field = |key: &str| text(secret, key);
        Some(Self {
            ca: Identity {
                certificate: field("ca.crt")?,
                key: field("ca.key")?,
            },
            serving: Identity {
                certificate: field("tls.crt")?,
                key: field("tls.key")?,
            },
        })
    }

    fn write(&self) -> BTreeMap<String, ByteString> {
        data(&[
            ("ca.crt", &self.ca.certificate),
            ("ca.key", &self.ca.key),
            ("tls.crt", &self.serving.certificate),
            ("tls.key", &self.serving.key),
        ])
    }
}

/// The certificates in use, kept current in the background. Cheap to clone; all clones are one.
#[derive(Clone)]
pub struct Certificates {
    server: ServerTls,
    mutual: ServerTls,
    client: ClientTls,
    ca: watch::Receiver<String>,
}

impl Certificates {
    /// Loads the certificates, or makes them where there are none; then keeps them current until `shutdown`.
    ///
    /// # Errors
    /// When the Secrets and the ConfigMap can neither be read nor written.
    pub async fn start(client: Client, namespace: &str, shutdown: CancellationToken) -> anyhow::Result<Self> {
        let store = Store::new(client, namespace);
        let material = store.load(SystemTime::now()).await?;
        let (sender, ca) = watch::channel(material.ca.certificate.clone());
        let this = Self {
            server: ServerTls::new(server_config(&material, ClientAuth::None)?),
            mutual: ServerTls::new(server_config(&material, ClientAuth::Required)?),
            client: ClientTls::new(client_config(&material)?),
            ca,
        };
        let keeper = this.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = keeper.keep(store, material, sender) => {}
                () = shutdown.cancelled() => {}
            }
        });
        Ok(this)
    }

    /// For servers that take any client: webhook, link.
    #[must_use]
    pub fn server(&self) -> ServerTls {
        self.server.clone()
    }

    /// For servers that take only clients with a certificate of our CA: the extender.
    #[must_use]
    pub fn mutual_server(&self) -> ServerTls {
        self.mutual.clone()
    }

    /// For dialling another replica, either kind of server.
    #[must_use]
    pub fn client(&self) -> ClientTls {
        self.client.clone()
    }

    /// The CA as PEM, for those who have to be told of it.
    #[must_use]
    pub fn ca(&self) -> watch::Receiver<String> {
        self.ca.clone()
    }

    async fn keep(&self, store: Store, mut material: Material, ca: watch::Sender<String>) {
        let mut wait = AGAIN;
        loop {
            tokio::time::sleep(wait).await;
            let next = match store.load(SystemTime::now()).await {
                Ok(next) => next,
                Err(error) => {
                    tracing::warn!(error = format!("{error:#}"), "cannot look at the certificates");
                    wait = RETRY;
                    continue;
                }
            };
            wait = AGAIN;
            if next == material {
                continue;
            }
            match self.replace(&next) {
                Ok(()) => {
                    tracing::info!("serving with the new certificate from now on");
                    ca.send_replace(next.ca.certificate.clone());
                    material = next;
                }
                Err(error) => tracing::error!(
                    error = format!("{error:#}"),
                    "the Secret ebb-serving cannot be used; the old certificate stays in use. Delete the Secret to \
                     have it made again"
                ),
            }
        }
    }

    fn replace(&self, material: &Material) -> anyhow::Result<()> {
        let (server, mutual, client) = (
            server_config(material, ClientAuth::None)?,
            server_config(material, ClientAuth::Required)?,
            client_config(material)?,
        );
        self.server.replace(server);
        self.mutual.replace(mutual);
        self.client.replace(client);
        Ok(())
    }
}

fn server_config(
    material: &Material,
    auth: ClientAuth,
) -> anyhow::Result<std::sync::Arc<rustls::ServerConfig>> {
    tls::server_config(&material.serving, &material.ca.certificate, auth)
}

fn client_config(material: &Material) -> anyhow::Result<std::sync::Arc<rustls::ClientConfig>> {
    tls::client_config(&material.ca.certificate, Some(&material.serving))
}

/// The objects in the cluster.
struct Store {
    secrets: Api<Secret>,
    config_maps: Api<ConfigMap>,
    names: Vec<String>,
}

impl Store {
    fn new(client: Client, namespace: &str) -> Self {
        Self {
            secrets: Api::namespaced(client.clone(), namespace),
            config_maps: Api::namespaced(client, namespace),
            names: pki::service_names(names::CONTROLLER, namespace),
        }
    }

    /// What all replicas agree on at `now`, made or renewed where needed.
    async fn load(&self, now: SystemTime) -> anyhow::Result<Material> {
        let material = self.material(now).await?;
        self.scheduler_client(&material, now).await?;
        self.publish_ca(&material).await?;
        Ok(material)
    }

    async fn material(&self, now: SystemTime) -> anyhow::Result<Material> {
        for _ in 0..ATTEMPTS {
            let found = get(&self.secrets, names::SERVING_SECRET).await?;
            let next = match found.as_ref().and_then(Material::read) {
                None => Material::new(&self.names, now)?,
                Some(material) => match material.renewed(&self.names, now)? {
                    None => return Ok(material),
                    Some(next) => next,
                },
            };
            let secret = secret(names::SERVING_SECRET, found, next.write());
            if write(&self.secrets, names::SERVING_SECRET, secret, |s| &s.metadata).await? {
                tracing::info!("made a certificate for {}", self.names[0]);
                return Ok(next);
            }
        }
        anyhow::bail!("another replica kept changing Secret {}", names::SERVING_SECRET)
    }

    async fn scheduler_client(&self, material: &Material, now: SystemTime) -> anyhow::Result<()> {
        for _ in 0..ATTEMPTS {
            let found = get(&self.secrets, names::SCHEDULER_CLIENT_SECRET).await?;
            let good = found.as_ref().is_some_and(|secret| {
                let field = |key: &str| text(secret, key).unwrap_or_default();
                field("ca.crt") == material.ca.certificate
                    && pki::is_signed_by(&field("tls.crt"), &material.ca.certificate)
                    && pki::is_key_of(&field("tls.key"), &field("tls.crt"))
                    && !pki::is_due(&field("tls.crt"), &[], now)
            });
            if good {
                return Ok(());
            }
            let client = pki::new_leaf(&material.ca, &Leaf::Client(SCHEDULER_CLIENT.to_owned()), now)?;
            let data = data(&[
                ("ca.crt", &material.ca.certificate),
                ("tls.crt", &client.certificate),
                ("tls.key", &client.key),
            ]);
            let secret = secret(names::SCHEDULER_CLIENT_SECRET, found, data);
            if write(&self.secrets, names::SCHEDULER_CLIENT_SECRET, secret, |s| {
                &s.metadata
            })
            .await?
            {
                return Ok(());
            }
        }
        anyhow::bail!(
            "another replica kept changing Secret {}",
            names::SCHEDULER_CLIENT_SECRET
        )
    }

    async fn publish_ca(&self, material: &Material) -> anyhow::Result<()> {
        for _ in 0..ATTEMPTS {
            let found = get(&self.config_maps, names::CA_CONFIG_MAP).await?;
            let ca = &material.ca.certificate;
            let mut map = found.unwrap_or_else(|| ConfigMap {
                metadata: metadata(names::CA_CONFIG_MAP),
                ..ConfigMap::default()
            });
            if map.data.as_ref().and_then(|data| data.get("ca.crt")) == Some(ca) {
                return Ok(());
            }
            map.data
                .get_or_insert_default()
                .insert("ca.crt".to_owned(), ca.clone());
            if write(&self.config_maps, names::CA_CONFIG_MAP, map, |m| &m.metadata).await? {
                return Ok(());
            }
        }
        anyhow::bail!("another replica kept changing ConfigMap {}", names::CA_CONFIG_MAP)
    }
}

fn metadata(name: &str) -> ObjectMeta {
    ObjectMeta {
        name: Some(name.to_owned()),
        labels: Some([("app.kubernetes.io/part-of".to_owned(), "ebb".to_owned())].into()),
        ..ObjectMeta::default()
    }
}

/// The Secret to write: the one that was found, at the version that was found, with new data.
fn secret(name: &str, found: Option<Secret>, data: BTreeMap<String, ByteString>) -> Secret {
    let mut secret = found.unwrap_or_else(|| Secret {
        metadata: metadata(name),
        type_: Some("kubernetes.io/tls".to_owned()),
        ..Secret::default()
    });
    secret.data = Some(data);
    secret
}

fn data(fields: &[(&str, &str)]) -> BTreeMap<String, ByteString> {
    fields
        .iter()
        .map(|(key, text)| ((*key).to_owned(), ByteString(text.as_bytes().to_vec())))
        .collect()
}

fn text(secret: &Secret, key: &str) -> Option<String> {
    let bytes = secret.data.as_ref()?.get(key)?;
    String::from_utf8(bytes.0.clone()).ok().filter(|t| !t.is_empty())
}

async fn get<K>(api: &Api<K>, name: &str) -> anyhow::Result<Option<K>>
where
    K: Clone + serde::de::DeserializeOwned + std::fmt::Debug,
{
    api.get_opt(name)
        .await
        .with_context(|| format!("cannot read {name}: check the controller's Role"))
}

/// Creates the object, or updates it if it carries a version. `false`: somebody else was faster, read again.
async fn write<K>(
    api: &Api<K>,
    name: &str,
    object: K,
    metadata: fn(&K) -> &ObjectMeta,
) -> anyhow::Result<bool>
where
    K: Clone + serde::Serialize + serde::de::DeserializeOwned + std::fmt::Debug,
{
    let params = PostParams {
        field_manager: Some(names::CONTROLLER.to_owned()),
        ..PostParams::default()
    };
    let result = if metadata(&object).resource_version.is_some() {
        api.replace(name, &params, &object).await
    } else {
        api.create(&params, &object).await
    };
    match result {
        Ok(_) => Ok(true),
        // 409: made or changed meanwhile; 404: deleted meanwhile.
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(false),
        Err(error) => Err(error).with_context(|| format!("cannot write {name}: check the controller's Role")),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const DAY: Duration = Duration::from_secs(24 * 3600);

    #[test]
    fn only_what_is_due_is_renewed() {
        let names = pki::service_names("ebb-controller", "ebb-system");
        let now = SystemTime::now();
        let first = Material::new(&names, now).unwrap();
        assert_eq!(first.renewed(&names, now).unwrap(), None);

        let second = first.renewed(&names, now + DAY * 61).unwrap().unwrap();
        assert_eq!(second.ca, first.ca);
        assert_ne!(second.serving, first.serving);
        assert_eq!(second.renewed(&names, now + DAY * 62).unwrap(), None);

        let late = now + DAY * 365 * 8;
        let third = second.renewed(&names, late).unwrap().unwrap();
        assert_ne!(third.ca.key, first.ca.key);
        assert!(third.ca.certificate.contains(first.ca.certificate.trim()));
        assert!(pki::is_signed_by(
            &third.serving.certificate,
            &third.ca.certificate
        ));
        assert_eq!(third.renewed(&names, late).unwrap(), None);
    }

    #[test]
    fn adversarial_a_broken_secret_is_made_anew() {
        let names = pki::service_names("ebb-controller", "ebb-system");
        let now = SystemTime::now();
        let good = Material::new(&names, now).unwrap();
        let mut wrong_key = good.clone();
        wrong_key.ca.key = pki::new_ca(now).unwrap().key;
        assert!(wrong_key.renewed(&names, now).unwrap().is_some());
        let mut garbage = good.clone();
        garbage.serving.certificate = "garbage".to_owned();
        let mended = garbage.renewed(&names, now).unwrap().unwrap();
        assert_eq!(mended.ca, good.ca);
        let mut no_ca = good;
        no_ca.ca.certificate = "garbage".to_owned();
        assert!(no_ca.renewed(&names, now).unwrap().is_some());
    }
}
