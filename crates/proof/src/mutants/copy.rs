//! A copy of the workspace with every bug in it, behind a switch.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::catalogue::{MUTANTS, SUPPORT};

/// The name of the program in the copy, so that it does not take the place of this one.
const PROGRAM: &str = "proof-with-planted-bugs";

/// Builds the program with the bugs and returns where it is.
pub fn build() -> Result<PathBuf, String> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let target = target(&workspace)?;
    let copy = target.join("planted-bugs");
    if copy.exists() {
        fs::remove_dir_all(&copy).map_err(|error| error.to_string())?;
    }
    for part in ["Cargo.toml", "Cargo.lock", "crates", "examples"] {
        copy_all(&workspace.join(part), &copy.join(part))?;
    }
    plant(&copy)?;
    let built = Command::new(env!("CARGO"))
        .args(["build", "--offline", "--workspace", "--all-features"])
        .args(["--bin", PROGRAM])
        .current_dir(&copy)
        .env("CARGO_TARGET_DIR", &target)
        .status();
    match built {
        Ok(status) if status.success() => Ok(target.join("debug").join(PROGRAM)),
        Ok(_) => Err("the code with the planted bugs does not build".into()),
        Err(error) => Err(format!("cargo cannot be run: {error}")),
    }
}

/// Where this program was built, with the features that all crates together ask for: what it was built with need not be built
/// again.
fn target(workspace: &Path) -> Result<PathBuf, String> {
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or(workspace.join("target"), PathBuf::from);
    std::path::absolute(target).map_err(|error| error.to_string())
}

fn copy_all(from: &Path, to: &Path) -> Result<(), String> {
    let failed = |error: std::io::Error| format!("{}: {error}", from.display());
    if from.is_dir() {
        fs::create_dir_all(to).map_err(failed)?;
        for entry in fs::read_dir(from).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            if entry.file_name() == "target" {
                continue;
            }
            copy_all(&entry.path(), &to.join(entry.file_name()))?;
        }
        return Ok(());
    }
    if let Some(folder) = to.parent() {
        fs::create_dir_all(folder).map_err(failed)?;
    }
    fs::copy(from, to).map(drop).map_err(failed)
}

fn plant(copy: &Path) -> Result<(), String> {
    for (file, find, replace) in SUPPORT {
        edit(copy, file, find, replace)?;
    }
    for mutant in MUTANTS {
        let krate = if mutant.file.starts_with("crates/core/") {
            "crate"
        } else {
            "onlyonce_core"
        };
        let switch = format!("{krate}::planted(\"{}\")", mutant.name);
        let replace = mutant.replace.replace("PLANTED", &switch);
        edit(copy, mutant.file, mutant.find, &replace)?;
    }
    // Otherwise cargo takes the copy's crates for ours, which it has built already.
    edit(
        copy,
        "Cargo.toml",
        "[workspace.package]\nversion = \"0.1.0\"",
        "[workspace.package]\nversion = \"0.1.99\"",
    )?;
    let name = format!("name = \"{PROGRAM}\"");
    edit(copy, "crates/proof/Cargo.toml", "name = \"proof\"", &name)
}

fn edit(copy: &Path, file: &str, find: &str, replace: &str) -> Result<(), String> {
    let path = copy.join(file);
    let text = fs::read_to_string(&path).map_err(|error| format!("{file}: {error}"))?;
    match text.matches(find).count() {
        1 => fs::write(&path, text.replacen(find, replace, 1)).map_err(|error| error.to_string()),
        found => Err(format!("{file} has {found} times, not once:\n{find}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bug_can_be_planted_and_the_code_that_ships_has_no_switch() {
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let copy = tempfile::tempdir().unwrap();
        for krate in ["core", "testkit", "proof"] {
            let krate = Path::new("crates").join(krate);
            copy_all(&workspace.join(&krate), &copy.path().join(&krate)).unwrap();
        }
        copy_all(
            &workspace.join("Cargo.toml"),
            &copy.path().join("Cargo.toml"),
        )
        .unwrap();
        let core = copy.path().join("crates/core/src/lib.rs");
        assert!(!fs::read_to_string(&core).unwrap().contains("planted"));
        plant(copy.path()).unwrap();
        assert!(fs::read_to_string(&core).unwrap().contains("fn planted"));
    }
}
