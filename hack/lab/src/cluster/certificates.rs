//! The certificates and kubeconfigs of a control plane, made anew for each
//! cluster and gone with it.

use std::path::{Path, PathBuf};

use anyhow::Context;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose,
};

use super::namespace::{CONTROL_PLANE_IP, KUBERNETES_SERVICE_IP};

/// A certificate authority and the folder it writes to.
pub struct Certificates {
    dir: PathBuf,
    server: String,
    ca_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Certificates {
    /// Makes the authority, the API server's serving certificate (`apiserver.{crt,key}`), and the key
    /// that signs ServiceAccount tokens (`service-account.{pub,key}`).
    ///
    /// # Errors
    /// If a key cannot be made or a file cannot be written.
    pub fn create(dir: &Path, server: &str) -> anyhow::Result<Self> {
        std::fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
        let key = KeyPair::generate().context("making the authority's key")?;
        let mut params = CertificateParams::default();
        params.distinguished_name = name("ebb-lab", None);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![
            KeyUsagePurpose::KeyCertSign,
            KeyUsagePurpose::CrlSign,
            KeyUsagePurpose::DigitalSignature,
        ];
        let ca = params
            .self_signed(&key)
            .context("making the authority's certificate")?;
        let this = Self {
            dir: dir.to_owned(),
            server: server.to_owned(),
            ca_pem: ca.pem(),
            issuer: Issuer::new(params, key),
        };
        this.write("ca.crt", &this.ca_pem)?;
        // The controller manager signs CertificateSigningRequests with it.
        this.write("ca.key", &this.issuer.key().serialize_pem())?;

        let names = [
            CONTROL_PLANE_IP,
            KUBERNETES_SERVICE_IP,
            "127.0.0.1",
            "localhost",
            "kubernetes",
            "kubernetes.default",
            "kubernetes.default.svc",
            "kubernetes.default.svc.cluster.local",
        ];
        let mut params = CertificateParams::new(names.map(String::from).to_vec())?;
        params.distinguished_name = name("kube-apiserver", None);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        this.sign("apiserver", params)?;

        let key = KeyPair::generate().context("making the ServiceAccount key")?;
        this.write("service-account.key", &key.serialize_pem())?;
        this.write("service-account.pub", &key.public_key_pem())?;
        Ok(this)
    }

    /// Makes a client certificate (`FILE.{crt,key}`) for `user` and the kubeconfig that uses it
    /// (`FILE.kubeconfig`), whose path is returned.
    ///
    /// # Errors
    /// If a key cannot be made or a file cannot be written.
    pub fn client(&self, file: &str, user: &str, group: Option<&str>) -> anyhow::Result<PathBuf> {
        let mut params = CertificateParams::default();
        params.distinguished_name = name(user, group);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.sign(file, params)?;
        let config = serde_json::json!({
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "lab",
            "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": user}}],
            "clusters": [{"name": "lab", "cluster": {
                "server": self.server,
                "certificate-authority": self.path("ca.crt"),
            }}],
            "users": [{"name": user, "user": {
                "client-certificate": self.path(&format!("{file}.crt")),
                "client-key": self.path(&format!("{file}.key")),
            }}],
        });
        let file = format!("{file}.kubeconfig");
        self.write(&file, &serde_yaml_ng::to_string(&config)?)?;
        Ok(self.path(&file))
    }

    /// The path of one of the files.
    #[must_use]
    pub fn path(&self, file: &str) -> PathBuf {
        self.dir.join(file)
    }

    fn sign(&self, file: &str, mut params: CertificateParams) -> anyhow::Result<()> {
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        let key = KeyPair::generate().with_context(|| format!("making {file}.key"))?;
        let certificate = params
            .signed_by(&key, &self.issuer)
            .with_context(|| format!("signing {file}.crt"))?;
        self.write(&format!("{file}.crt"), &certificate.pem())?;
        self.write(&format!("{file}.key"), &key.serialize_pem())
    }

    fn write(&self, file: &str, content: &str) -> anyhow::Result<()> {
        use std::io::Write;
        use std::os::unix::fs::OpenOptionsExt;
        let path = self.path(file);
        std::fs::OpenOptions::new()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(&path)
            .and_then(|mut out| out.write_all(content.as_bytes()))
            .with_context(|| format!("writing {}", path.display()))
    }
}

fn name(common_name: &str, organization: Option<&str>) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    if let Some(organization) = organization {
        name.push(DnType::OrganizationName, organization);
    }
    name.push(DnType::CommonName, common_name);
    name
}
