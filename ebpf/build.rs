//! Compiles the kernel programs (`programs/`) for the BPF target and hands the object's path to the crate.
//!
//! The programs need `core` built from source, so a compiler with its sources is
//! looked for: Debian's `rustc-web` with `rust-web-src`, else a rustup nightly with
//! `rust-src`. Cargo is called directly, in a target folder of its own: the outer
//! cargo holds the lock of the shared one.

use std::env;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const PACKAGE: &str = "clustermesh-ebpf-programs";
const BINARY: &str = "clustermesh-bpf";
const TARGET: &str = "bpfel-unknown-none";
const PROFILE: &str = "ebpf";
/// `--btf` and full debug info give the object its BTF; CPU v3 has 32-bit jumps and ALU (kernel 5.1).
/// Without the second linker option every copy and every zeroing becomes a call that goes byte by byte.
const RUSTFLAGS: [&str; 4] = [
    "-Clink-arg=--btf",
    "-Clink-arg=--disable-expand-memcpy-in-order",
    "-Cdebuginfo=2",
    "-Ctarget-cpu=v3",
];
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
const DEBIAN_CARGO: &str = "/usr/bin/cargo";

fn main() {
    if let Err(error) = build() {
        eprintln!("cannot build the kernel programs: {error}");
        std::process::exit(1);
    }
}

/// A failed step, for people.
struct BuildError(String);

impl fmt::Display for BuildError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A compiler that can build `core`, and how to start its cargo.
struct Toolchain {
    name: String,
    cargo: Vec<OsString>,
    rustc: Option<PathBuf>,
}

fn build() -> Result<(), BuildError> {
    let manifest_dir = PathBuf::from(variable("CARGO_MANIFEST_DIR")?);
    let out_dir = PathBuf::from(variable("OUT_DIR")?);
    let workspace = manifest_dir
        .parent()
        .ok_or_else(|| BuildError("the crate has no parent folder".to_owned()))?;

    for watched in [
        "build.rs",
        "programs/src",
        "programs/Cargo.toml",
        "abi/src",
        "abi/Cargo.toml",
    ] {
        println!(
            "cargo::rerun-if-changed={}",
            manifest_dir.join(watched).display()
        );
    }
    println!("cargo::rerun-if-env-changed=PATH");

    let layout_next = env::var_os("CARGO_FEATURE_LAYOUT_NEXT").is_some();
    let toolchain = find_toolchain()?;
    let linker = find_linker()?;
    // One folder per feature set: two objects of the same name must not overwrite each other.
    let target_dir =
        target_root(&out_dir)
            .join("ebpf")
            .join(if layout_next { "layout-next" } else { "layout" });

    let mut command = Command::new(&toolchain.cargo[0]);
    command.args(&toolchain.cargo[1..]).current_dir(workspace);
    command.args([
        "build",
        "--package",
        PACKAGE,
        "--bin",
        BINARY,
        "--target",
        TARGET,
        "--profile",
        PROFILE,
    ]);
    command
        .args(["-Z", "build-std=core", "--target-dir"])
        .arg(&target_dir);
    if layout_next {
        command.args(["--features", "layout-next"]);
    }
    // What the outer cargo set for its own compiler must not reach the inner one.
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        let kept =
            text == "CARGO_HOME" || text.starts_with("CARGO_NET") || text.starts_with("CARGO_HTTP");
        if (text.starts_with("CARGO") || text.starts_with("RUST")) && text != "RUSTUP_HOME" && !kept
        {
            command.env_remove(&name);
        }
    }
    command.env("CARGO_ENCODED_RUSTFLAGS", RUSTFLAGS.join("\x1f"));
    command.env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", &linker);
    if let Some(rustc) = &toolchain.rustc {
        command.env("RUSTC", rustc).env("RUSTC_BOOTSTRAP", "1");
    }

    println!(
        "cargo::warning=kernel programs: compiled by {}",
        toolchain.name
    );
    let status = command
        .stdout(Stdio::null())
        .status()
        .map_err(|error| BuildError(format!("{} does not start: {error}", toolchain.name)))?;
    if !status.success() {
        return Err(BuildError(format!(
            "{} failed ({status}). If the message above is the linker's: {} must be built for the LLVM of that compiler (`rustc -vV`); `make setup` does it",
            toolchain.name,
            linker.display()
        )));
    }

    let built = target_dir.join(TARGET).join(PROFILE).join(BINARY);
    let object = out_dir.join("clustermesh-bpf.o");
    std::fs::copy(&built, &object)
        .map_err(|error| BuildError(format!("cannot copy {}: {error}", built.display())))?;
    println!(
        "cargo::rustc-env=CLUSTERMESH_BPF_OBJECT={}",
        object.display()
    );
    Ok(())
}

fn variable(name: &str) -> Result<OsString, BuildError> {
    env::var_os(name)
        .ok_or_else(|| BuildError(format!("{name} is not set; run this through cargo")))
}

/// The outer target folder: `OUT_DIR` is `<target>/<profile>/build/<package>/out`.
fn target_root(out_dir: &Path) -> &Path {
    out_dir.ancestors().nth(4).unwrap_or(out_dir)
}

fn find_toolchain() -> Result<Toolchain, BuildError> {
    let debian = Path::new(DEBIAN_RUSTC);
    if Path::new(DEBIAN_CARGO).is_file() && has_core_source(Command::new(debian)) {
        return Ok(Toolchain {
            name: format!(
                "{DEBIAN_CARGO} with {}",
                first_line(Command::new(debian).arg("--version"))
            ),
            cargo: vec![DEBIAN_CARGO.into()],
            rustc: Some(debian.to_owned()),
        });
    }
    let mut nightly = Command::new("rustup");
    nightly.args(["run", "nightly", "rustc"]);
    if has_core_source(nightly) {
        let version =
            first_line(Command::new("rustup").args(["run", "nightly", "rustc", "--version"]));
        return Ok(Toolchain {
            name: format!("rustup's nightly, {version}"),
            cargo: ["rustup", "run", "nightly", "cargo"]
                .map(OsString::from)
                .to_vec(),
            rustc: None,
        });
    }
    Err(BuildError(
        "no Rust compiler with the sources of `core` was found. Run `make setup`, or install one by hand: \
         `apt-get install rustc-web cargo-web rust-web-src` (Debian), \
         `rustup toolchain install nightly --component rust-src` (elsewhere)"
            .to_owned(),
    ))
}

fn has_core_source(mut rustc: Command) -> bool {
    let sysroot = first_line(rustc.args(["--print", "sysroot"]));
    !sysroot.is_empty()
        && Path::new(&sysroot)
            .join("lib/rustlib/src/rust/library/core/Cargo.toml")
            .is_file()
}

/// First line of what a command prints; empty when it fails.
fn first_line(command: &mut Command) -> String {
    // The outer cargo's choice of toolchain would otherwise answer for the one asked.
    let output = command
        .env_remove("RUSTUP_TOOLCHAIN")
        .stderr(Stdio::null())
        .output();
    output
        .ok()
        .filter(|output| output.status.success())
        .and_then(|output| String::from_utf8(output.stdout).ok())
        .and_then(|text| text.lines().next().map(str::to_owned))
        .unwrap_or_default()
}

fn find_linker() -> Result<PathBuf, BuildError> {
    let cargo_home = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cargo")));
    env::var_os("PATH")
        .iter()
        .flat_map(|path| env::split_paths(path).collect::<Vec<_>>())
        .chain(cargo_home.map(|home| home.join("bin")))
        .map(|folder| folder.join("bpf-linker"))
        .find(|candidate| candidate.is_file())
        .ok_or_else(|| {
            BuildError(
                "bpf-linker is not installed. Run `make setup`, or `cargo install bpf-linker --version 0.13.0 --locked` \
                 with the LLVM feature that matches the compiler"
                    .to_owned(),
            )
        })
}
