use super::*;
use tempfile::TempDir;

/// A made-up machine.
struct Tree(TempDir);

impl Tree {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn file(self, path: &str, text: &str) -> Self {
        let path = self.0.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
        self
    }

    /// So many sockets of so many cores; the second hardware thread of each is numbered after all first ones.
    fn machine(sockets: usize, cores: usize, smt: bool) -> Self {
        let all = sockets * cores;
        let online = if smt { 2 * all } else { all };
        let mut tree = Self::new().file("sys/devices/system/cpu/online", &format!("0-{}\n", online - 1));
        for cpu in 0..online {
            let core = cpu % all;
            let siblings = if smt { format!("{core},{}\n", core + all) } else { format!("{core}\n") };
            tree = tree.file(&format!("sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"), &siblings);
        }
        for node in 0..sockets {
            let (first, last) = (node * cores, (node + 1) * cores - 1);
            let second = if smt { format!(",{}-{}", first + all, last + all) } else { String::new() };
            tree =
                tree.file(&format!("sys/devices/system/node/node{node}/cpulist"), &format!("{first}-{last}{second}\n"));
        }
        tree.file("sys/devices/system/node/possible", "0-1\n").allow(&format!("0-{}", online - 1))
    }

    fn allow(self, list: &str) -> Self {
        self.file("proc/thread-self/status", &format!("Name:\tbitnet\nCpus_allowed:\tff\nCpus_allowed_list:\t{list}\n"))
    }

    fn read(&self) -> Topology {
        Topology::read(self.0.path()).unwrap()
    }
}

/// Cores, hardware threads and threads.
fn counts(t: &Topology) -> (usize, usize, usize) {
    (t.cores(), t.hardware_threads(), t.threads())
}

#[test]
fn one_socket_has_a_thread_for_each_core() {
    let plain = Tree::machine(1, 6, false).read();
    assert_eq!((counts(&plain), plain.nodes(), plain.quota()), ((6, 6, 6), vec![(0, 6)], None));
    assert_eq!(plain.why(), "one for each core");
    let smt = Tree::machine(1, 6, true).read();
    assert_eq!((counts(&smt), smt.online_threads()), ((6, 12, 6), 12));
    for threads in [1, 6, 12, 100] {
        assert_eq!(smt.seats(threads), None);
    }
}

#[test]
fn two_sockets_seat_threads_node_by_node() {
    let t = Tree::machine(2, 4, true).read();
    assert_eq!((counts(&t), t.nodes()), ((8, 16, 8), vec![(0, 4), (1, 4)]));
    assert!((1..=4).all(|threads| t.seats(threads).is_none()), "one node has cores enough");
    let seats = t.seats(8).unwrap();
    let pairs: Vec<_> = (0..8).map(|i| vec![i, i + 8]).collect();
    assert_eq!(seats.cores, pairs);
    assert_eq!(seats.neighbours, [vec![0..4; 4], vec![4..8; 4]].concat());
    // Between one node's cores and all: both nodes have their share of the memory and of the work.
    let six = t.seats(6).unwrap();
    assert_eq!(six.cores, [0, 1, 2, 4, 5, 6].map(|core| vec![core, core + 8]));
    assert_eq!(six.neighbours, [vec![0..3; 3], vec![3..6; 3]].concat());
    // More than there are cores: two on some of them.
    let twelve = t.seats(12).unwrap();
    assert_eq!(twelve.neighbours, [vec![0..6; 6], vec![6..12; 6]].concat());
    assert!(t.cores.iter().all(|core| (1..=2).contains(&twelve.cores.iter().filter(|c| **c == core.threads).count())));
    assert!(t.seats(16).unwrap().cores.chunks(2).all(|two| two[0] == two[1]));
}

#[test]
fn the_mask_says_what_may_be_used() {
    // Two cores of the first socket, one with one hardware thread; four of the second, one by its second thread only.
    let t = Tree::machine(2, 4, true).allow("0-1,4,6,8,13,15").read();
    assert_eq!((counts(&t), t.nodes(), t.online_threads()), ((6, 7, 6), vec![(1, 4), (0, 2)], 16));
    assert_eq!(t.why(), "one for each core that the affinity mask allows");
    let seats = t.seats(6).unwrap();
    assert_eq!(seats.cores, [vec![4], vec![13], vec![6], vec![15], vec![0, 8], vec![1]]);
    assert_eq!(seats.neighbours, [vec![0..4; 4], vec![4..6; 2]].concat());
    assert_eq!(t.seats(4), None);
    // One socket's cores are no reason to pin anything.
    assert_eq!(Tree::machine(2, 4, true).allow("4-7,12-15").read().seats(4), None);
    // What is not there is not counted, and offline threads are not there.
    let mask = Tree::machine(1, 4, false).allow("0-63").read();
    assert_eq!(counts(&mask), (4, 4, 4));
    let offline = Tree::machine(1, 4, false).file("sys/devices/system/cpu/online", "0,2\n").read();
    assert_eq!((counts(&offline), offline.online_threads()), ((2, 2, 2), 2));
}

#[test]
fn a_container_gets_what_its_quota_pays_for() {
    let container =
        |quota: &str| Tree::machine(1, 8, true).file("proc/self/cgroup", "0::/\n").file("sys/fs/cgroup/cpu.max", quota);
    let t = container("250000 100000\n").read();
    assert_eq!((counts(&t), t.quota()), ((8, 16, 2), Some(2.5)));
    assert_eq!(t.why(), "a control group allows the time of 2.5 cores");
    assert_eq!(counts(&container("max 100000\n").read()), (8, 16, 8));
    assert_eq!(counts(&container("50000 100000\n").read()), (8, 16, 1), "less than one core is one thread");
    assert_eq!(counts(&container("1600000 100000\n").read()), (8, 16, 8), "more than there is changes nothing");

    // The least of a group and those above it.
    let nested = Tree::machine(1, 8, false)
        .file("proc/self/cgroup", "0::/pods/one/app\n")
        .file("sys/fs/cgroup/pods/one/app/cpu.max", "max 100000\n")
        .file("sys/fs/cgroup/pods/one/cpu.max", "600000 100000\n")
        .file("sys/fs/cgroup/pods/cpu.max", "400000 100000\n");
    assert_eq!(nested.read().threads(), 4);

    // Version 1, by the group's path and, where that is the host's, at the top.
    let first = |path: &str| {
        Tree::machine(1, 8, false)
            .file("proc/self/cgroup", "5:memory:/other\n4:cpu,cpuacct:/docker/abc\n1:name=systemd:/\n")
            .file(&format!("sys/fs/cgroup/{path}/cpu.cfs_quota_us"), "300000\n")
            .file(&format!("sys/fs/cgroup/{path}/cpu.cfs_period_us"), "100000\n")
    };
    for path in ["cpu,cpuacct/docker/abc", "cpu/docker", "cpu"] {
        assert_eq!(first(path).read().quota(), Some(3.0), "{path}");
    }
    assert_eq!(first("memory").read().quota(), None);
    assert_eq!(first("cpu").file("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n").read().quota(), None);
}

#[test]
fn broken_files_are_left_out() {
    // No lists of siblings: every hardware thread is a core.
    let alone = Tree::new().file("sys/devices/system/cpu/online", "0-3\n").read();
    assert_eq!((counts(&alone), alone.nodes()), ((4, 4, 4), vec![(0, 4)]));
    // One that does not name the thread itself, and nonsense: that thread is a core.
    let siblings = |text: &str| {
        let tree = Tree::machine(1, 4, true);
        counts(&tree.file("sys/devices/system/cpu/cpu6/topology/thread_siblings_list", text).read())
    };
    for text in ["", "0,4", "two", "2-", "-", "9-3", "2,99999999999999999999999", "0-4294967295"] {
        assert_eq!(siblings(text), (5, 8, 5), "{text}");
    }
    // A node that names no threads has memory only; threads on no node make one node of all.
    let node = |text: &str| Tree::machine(2, 4, false).file("sys/devices/system/node/node1/cpulist", text).read();
    assert_eq!(Tree::machine(2, 4, false).file("sys/devices/system/node/node2/cpulist", "\n").read().nodes().len(), 2);
    for text in ["", "4-6", "4-7x", "8000-9000"] {
        assert_eq!((node(text).nodes(), node(text).seats(8)), (vec![(0, 8)], None), "{text}");
    }
    assert_eq!(node("0-7").nodes(), [(0, 4), (1, 4)]);
    // A mask that cannot be read.
    for mask in ["", "x", "7-0", "100-101"] {
        let t = Topology::read(Tree::machine(1, 4, false).allow(mask).0.path());
        assert!(t.is_none_or(|t| t.threads() == 4), "{mask}");
    }
    // Groups that make no sense.
    for (groups, quota) in
        [("", "100000 100000"), ("0::/../..", "0 0"), ("nonsense", "1"), ("0::/", "x y"), ("0::/", "-5 7")]
    {
        let tree = Tree::machine(1, 4, false).file("proc/self/cgroup", groups).file("sys/fs/cgroup/cpu.max", quota);
        assert_eq!(tree.read().quota(), None, "{groups} {quota}");
    }
    assert_eq!(Topology::read(Tree::new().0.path()), None);
}

#[test]
fn this_machine_has_a_core() {
    let t = Topology::here();
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    assert!((1..=t.hardware_threads().max(t.cores())).contains(&t.threads()));
    assert!(t.threads() <= threads && t.online_threads() >= 1 && !t.nodes().is_empty() && !t.why().is_empty());
}

#[cfg(target_os = "linux")]
#[test]
fn a_thread_stays_where_it_is_put() {
    let allowed = |status: &str| {
        let status = std::fs::read_to_string(status).unwrap();
        cpu_list(status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap()).unwrap()
    };
    let mine = allowed("/proc/thread-self/status");
    let last = *mine.last().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            assert!(keep_this_thread_on(&[last]));
            assert_eq!(allowed("/proc/thread-self/status"), [last]);
            assert!(!keep_this_thread_on(&[]) && !keep_this_thread_on(&[MAX_HARDWARE_THREADS]));
        });
    });
    assert_eq!(allowed("/proc/thread-self/status"), mine, "other threads are not moved");
}
