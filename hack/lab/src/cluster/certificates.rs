//! The certificates and kubeconfigs of a control plane, made anew for each
//! cluster and gone with it.

use std::path::{Path, PathBuf};

use anyhow::Context;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, ExtendedKeyUsagePurpose,
    IsCa, KeyPair, KeyUsagePurpose,
};

use super::namespace::{CONTROL_PLANE_IP, KUBERNETES_SERVICE_IP};

type Authority = CertifiedIssuer<'static, KeyPair>;

/// The name, and the file, of the certificate that the API server shows to aggregated ones.
pub const FRONT_PROXY: &str = "front-proxy-client";

/// A certificate authority and the folder it writes to.
pub struct Certificates {
    dir: PathBuf,
    server: String,
    issuer: Authority,
}

impl Certificates {
    /// Makes the authority, the API server's serving certificate (`apiserver.{crt,key}`), and the key
    /// that signs ServiceAccount tokens (`service-account.{pub,key}`).
    ///
    /// # Errors
    /// If a key cannot be made or a file cannot be written.
    pub fn create(dir: &Path, server: &str) -> anyhow::Result<Self> {
        std::fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
        let this = Self {
            dir: dir.to_owned(),
            server: server.to_owned(),
            issuer: authority("ebb-lab")?,
        };
        this.write_authority("ca", &this.issuer)?;

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
        this.sign("apiserver", params, &this.issuer)?;

        // Aggregated API servers know the API server by an authority of its own: who holds a certificate
        // of this one may name any user.
        let front_proxy = authority("ebb-lab-front-proxy")?;
        this.write_authority("front-proxy-ca", &front_proxy)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = name(FRONT_PROXY, None);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        this.sign(FRONT_PROXY, params, &front_proxy)?;

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
        self.sign(file, params, &self.issuer)?;
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

    fn write_authority(&self, file: &str, authority: &Authority) -> anyhow::Result<()> {
        self.write(&format!("{file}.crt"), &authority.pem())?;
        // The controller manager signs CertificateSigningRequests with it.
        self.write(&format!("{file}.key"), &authority.key().serialize_pem())
    }

    fn sign(&self, file: &str, mut params: CertificateParams, issuer: &Authority) -> anyhow::Result<()> {
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        let key = KeyPair::generate().with_context(|| format!("making {file}.key"))?;
        let certificate = params
            .signed_by(&key, issuer)
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

fn authority(common_name: &str) -> anyhow::Result<Authority> {
    let key = KeyPair::generate().context("making an authority's key")?;
    let mut params = CertificateParams::default();
    params.distinguished_name = name(common_name, None);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![
        KeyUsagePurpose::KeyCertSign,
        KeyUsagePurpose::CrlSign,
        KeyUsagePurpose::DigitalSignature,
    ];
    CertifiedIssuer::self_signed(params, key).context("making an authority's certificate")
}

fn name(common_name: &str, organization: Option<&str>) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    if let Some(organization) = organization {
        name.push(DnType::OrganizationName, organization);
    }
    name.push(DnType::CommonName, common_name);
    name
}
