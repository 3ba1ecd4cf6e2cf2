//! Builds the stand-in for NVIDIA's management library as a shared object of the real one's name, so that whoever
//! loads `libnvidia-ml.so.1` loads this one when its folder comes first in `LD_LIBRARY_PATH`.

use std::path::PathBuf;

fn main() {
    println!("cargo:rerun-if-changed=nvml/nvml.c");
    println!("cargo:rerun-if-changed=nvml/nvml.map");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR for build scripts"));
    // A folder of its own: it is put in front of LD_LIBRARY_PATH, where nothing else may be found.
    let dir = out.join("nvml");
    std::fs::create_dir_all(&dir).expect("OUT_DIR is writable");
    let library = dir.join("libnvidia-ml.so.1");

    let status = cc::Build::new()
        .opt_level(2)
        .pic(true)
        .get_compiler()
        .to_command()
        .args([
            "-std=c11",
            "-Wall",
            "-Wextra",
            "-fvisibility=hidden",
            "-pthread",
            "-shared",
        ])
        .args([
            "-Wl,-soname,libnvidia-ml.so.1",
            "-Wl,--version-script=nvml/nvml.map",
            "-o",
        ])
        .arg(&library)
        .arg("nvml/nvml.c")
        .status()
        .expect("a C compiler is installed (Debian: apt-get install gcc)");
    assert!(
        status.success(),
        "the C compiler failed on hack/lab/nvml/nvml.c: {status}"
    );
    println!("cargo:rustc-env=EBB_LAB_NVML_DIR={}", dir.display());
}
