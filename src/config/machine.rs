//! What this process may use of the machine: cores and memory, within its control groups. Divides nothing by itself but
//! says the shares.

use std::num::NonZeroUsize;
use std::path::Path;

/// KV caches together take by default at most `1 / KV_SHARE_DIVISOR` of the free memory: the weights, which are mapped
/// and shared by all instances, and activations need the rest.
pub const KV_SHARE_DIVISOR: u64 = 2;

/// Resources this process may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Machine {
    /// Cores: the scheduling affinity and the control group's quota, whichever is less, at least 1.
    pub n_cores: usize,
    /// Bytes that can still be allocated before the machine or a control group runs out.
    pub free_memory_bytes: u64,
}

impl Machine {
    /// Measures the machine.
    pub fn detect() -> Machine {
        // The standard library reads the affinity mask and the quotas of both versions of control groups.
        let n_cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        Machine {
            n_cores,
            free_memory_bytes: free_memory_bytes(Path::new("/")),
        }
    }

    /// Threads of each of `n_instances` that share the machine, at least 1.
    pub fn threads_per_instance(&self, n_instances: usize) -> usize {
        (self.n_cores / n_instances.max(1)).max(1)
    }

    /// The largest default of each of `n_instances`' KV memory.
    pub fn kv_share_bytes(&self, n_instances: usize) -> u64 {
        self.free_memory_bytes / KV_SHARE_DIVISOR / n_instances.max(1) as u64
    }
}

/// The machine's available memory or, where less, what is left to this process's control group or one that holds it.
/// `root` is `/`, or a folder that looks like it.
fn free_memory_bytes(root: &Path) -> u64 {
    let read = |path: &str| std::fs::read_to_string(root.join(path)).ok();
    let machine = read("proc/meminfo")
        .as_deref()
        .and_then(available_in_meminfo)
        .unwrap_or(u64::MAX);

    let cgroups = read("proc/self/cgroup").unwrap_or_default();
    let own = cgroups
        .lines()
        .find_map(|line| line.strip_prefix("0::"))
        .unwrap_or("/")
        .trim_start_matches('/');
    let mount = root.join("sys/fs/cgroup");
    let mut groups = mount.join(own);
    let mut free = machine;
    while groups.starts_with(&mount) {
        free = free.min(free_in_group(&groups).unwrap_or(u64::MAX));
        if !groups.pop() {
            break;
        }
    }
    free
}

fn available_in_meminfo(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// What a version 2 group can still give: its limit, less its use that cannot be taken back. `None` without a limit.
fn free_in_group(group: &Path) -> Option<u64> {
    let number = |file: &str| {
        std::fs::read_to_string(group.join(file))
            .ok()?
            .trim()
            .parse::<u64>()
            .ok()
    };
    let limit = number("memory.max")?;
    let used = number("memory.current").unwrap_or(0);
    let stat = std::fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
    // Clean file pages, such as mapped weights not in use, are given back under pressure.
    let reclaimable = stat
        .lines()
        .find_map(|line| line.strip_prefix("inactive_file ")?.trim().parse::<u64>().ok());
    Some(limit.saturating_sub(used.saturating_sub(reclaimable.unwrap_or(0))))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn root(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().expect("a temporary folder");
        for (path, content) in files {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().expect("a parent")).expect("created");
            std::fs::write(path, content).expect("written");
        }
        root
    }

    const MEMINFO: (&str, &str) = ("proc/meminfo", "MemTotal:  16777216 kB\nMemAvailable:  8388608 kB\n");

    #[test]
    fn without_a_limit_the_machine_decides() {
        assert_eq!(free_memory_bytes(root(&[MEMINFO]).path()), 8 * GIB);
        let unlimited = root(&[
            MEMINFO,
            ("proc/self/cgroup", "0::/a\n"),
            ("sys/fs/cgroup/a/memory.max", "max\n"),
        ]);
        assert_eq!(free_memory_bytes(unlimited.path()), 8 * GIB);
    }

    #[test]
    fn the_tightest_group_above_counts() {
        let nested = root(&[
            MEMINFO,
            ("proc/self/cgroup", "1:name=systemd:/x\n0::/pod/container\n"),
            ("sys/fs/cgroup/pod/memory.max", "4294967296\n"),
            ("sys/fs/cgroup/pod/memory.current", "3221225472\n"),
            ("sys/fs/cgroup/pod/memory.stat", "anon 1\ninactive_file 1073741824\n"),
            ("sys/fs/cgroup/pod/container/memory.max", "max\n"),
        ]);
        assert_eq!(free_memory_bytes(nested.path()), 2 * GIB);
    }

    #[test]
    fn shares_are_never_zero_threads() {
        let machine = Machine {
            n_cores: 2,
            free_memory_bytes: 8 * GIB,
        };
        assert_eq!(machine.threads_per_instance(1), 2);
        assert_eq!(machine.threads_per_instance(5), 1);
        assert_eq!(machine.kv_share_bytes(2), 2 * GIB);
        assert!(Machine::detect().n_cores >= 1);
    }
}
