// Package deb builds the Debian packages; docs/install.md is for who installs
// them.
package deb

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/dunlin/dunlin/agent"
	"github.com/dunlin/dunlin/controller"
	"github.com/dunlin/dunlin/internal/program"
)

var daemons = []string{"dunlin-agent", "dunlin-controller"}

func none(string) string { return "" }

// TestScripts: the scripts are of the shell that Debian has, and name nothing
// that the build does not fill in.
func TestScripts(t *testing.T) {
	for _, name := range []string{"build.sh", "postinst", "prerm", "postrm"} {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if out, err := exec.CommandContext(t.Context(), "sh", "-n", name).CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", name, err, out)
		}
		if name == "build.sh" {
			continue
		}
		if rest := bytes.ReplaceAll(text, []byte("@NAME@"), nil); regexp.MustCompile(`@[A-Z]+@`).Match(rest) {
			t.Errorf("%s has places that are filled in, beside the name", name)
		}
		if !bytes.Contains(text, []byte("\nset -e\n")) {
			t.Errorf("%s goes on after a failure", name)
		}
	}
}

// TestSettings: the settings are taken as they are installed, and what stands in them as an example is taken.
func TestSettings(t *testing.T) {
	for _, name := range daemons {
		text, err := os.ReadFile(filepath.Join("../../cmd", name, "config.yaml"))
		if err != nil {
			t.Fatal(err)
		}
		load := func(text []byte) error {
			dir := t.TempDir()
			// The token is where the example says, but for the root.
			text = bytes.ReplaceAll(text, []byte("@/etc/dunlin-agent"), []byte("@"+dir))
			if err := os.WriteFile(filepath.Join(dir, "join-token"), []byte("dunlin_join_x\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			path := filepath.Join(dir, "config.yaml")
			if err := os.WriteFile(path, text, 0o600); err != nil {
				t.Fatal(err)
			}
			args := []string{"--config", path, "--data", dir}
			if name == "dunlin-agent" {
				_, err = agent.ParseConfig(args, none, io.Discard)
			} else {
				_, err = controller.LoadConfig(args, none, io.Discard)
			}
			return err
		}
		if err := load(text); err != nil {
			t.Errorf("%s as installed: %v", name, err)
		}
		if err := load(regexp.MustCompile(`(?m)^#([a-z-]+: )`).ReplaceAll(text, []byte("$1"))); err != nil {
			t.Errorf("%s with its examples: %v", name, err)
		}
	}
}

// build makes the packages once for a test and gives their paths by name.
func build(t *testing.T) map[string]string {
	t.Helper()
	if os.Getenv("DUNLIN_DEB") == "" {
		t.Skip("takes minutes: make test-deb")
	}
	var stderr bytes.Buffer
	cmd := exec.CommandContext(t.Context(), "sh", "build.sh", t.TempDir())
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if e, ok := errors.AsType[*exec.ExitError](err); ok && e.ExitCode() == 3 {
		t.Skipf("nfpm, which writes the packages, cannot be fetched:\n%s", &stderr)
	}
	if err != nil {
		t.Fatalf("build.sh: %v\n%s", err, &stderr)
	}
	packages := map[string]string{}
	for path := range strings.Lines(string(out)) {
		path = strings.TrimSpace(path)
		name, _, _ := strings.Cut(filepath.Base(path), "_")
		packages[name] = path
	}
	if len(packages) != 3 {
		t.Fatalf("build.sh made %v", packages)
	}
	return packages
}

// TestPackages looks into the packages, then installs them into a folder, as
// images are made, upgrades them and purges them.
func TestPackages(t *testing.T) {
	packages := build(t)
	for name, path := range packages {
		t.Run(name, func(t *testing.T) { look(t, name, path) })
	}
	t.Run("install", func(t *testing.T) { install(t, packages) })
}

// look holds what is in a package against what should be.
func look(t *testing.T, name, path string) {
	control, data := open(t, path)
	want := map[string]string{
		"/usr/bin/" + name:                             "-rwxr-xr-x",
		"/usr/share/doc/" + name + "/copyright":        "-rw-r--r--",
		"/usr/lib/systemd/system/" + name + ".service": "-rw-r--r--",
		"/usr/lib/sysusers.d/" + name + ".conf":        "-rw-r--r--",
		"/etc/" + name + "/":                           "drwxr-x---",
		"/etc/" + name + "/config.yaml":                "-rw-r-----",
		"/usr/lib/dunlin/libonnxruntime.so.1":          "-rw-r--r--",
	}
	if name != "dunlin-agent" {
		delete(want, "/usr/lib/dunlin/libonnxruntime.so.1")
	}
	if name == "dunlin" {
		maps.DeleteFunc(want, func(path, _ string) bool {
			return !strings.HasPrefix(path, "/usr/bin/") && !strings.HasPrefix(path, "/usr/share/")
		})
		pages := 0
		for path := range data {
			if strings.HasPrefix(path, "/usr/share/man/man1/dunlin") && strings.HasSuffix(path, ".1.gz") {
				want[path] = "-rw-r--r--"
				pages++
			}
		}
		if pages < 60 {
			t.Errorf("there are %d manual pages", pages)
		}
	}
	for path, f := range data {
		mode := f.FileInfo().Mode().String()
		if f.Uname != "root" || f.Gname != "root" || f.Uid != 0 || f.Gid != 0 {
			t.Errorf("%s belongs to %s:%s (%d:%d)", path, f.Uname, f.Gname, f.Uid, f.Gid)
		}
		if m := want[path]; m != "" {
			if m != mode {
				t.Errorf("%s has mode %s, not %s", path, mode, m)
			}
			delete(want, path)
		} else if mode != "drwxr-xr-x" {
			t.Errorf("there is %s %s, which nobody asked for", mode, path)
		}
	}
	for path := range want {
		t.Errorf("%s is missing", path)
	}

	text := string(control["/control"].content)
	for _, line := range []string{"Package: " + name, "Version: " + program.Version(), "License: Apache-2.0"} {
		if !strings.Contains("\n"+text, "\n"+line+"\n") {
			t.Errorf("control lacks %q:\n%s", line, text)
		}
	}
	if needs := regexp.MustCompile(`\nDepends: libc6 \(>= 2\.\d+\), systemd \(>= 247\)\n`).MatchString(text); needs != (name == "dunlin-agent") {
		t.Errorf("control says that it needs libc: %v\n%s", needs, text)
	}
	if name == "dunlin" {
		if len(control["/postinst"].content)+len(control["/prerm"].content)+len(control["/postrm"].content) > 0 {
			t.Error("the command line's package has scripts")
		}
		return
	}
	if got := string(control["/conffiles"].content); strings.TrimSpace(got) != "/etc/"+name+"/config.yaml" {
		t.Errorf("conffiles: %q", got)
	}
	for _, script := range []string{"postinst", "prerm", "postrm"} {
		f := control["/"+script]
		if f.Header == nil || f.FileInfo().Mode().Perm() != 0o755 || bytes.Contains(f.content, []byte("@")) {
			t.Errorf("%s is missing, or has another mode than 0755, or places that were not filled in:\n%s", script, f.content)
			continue
		}
		cmd := exec.CommandContext(t.Context(), "sh", "-n")
		cmd.Stdin = bytes.NewReader(f.content)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", script, err, out)
		}
	}
	for path, source := range map[string]string{
		"/usr/lib/systemd/system/" + name + ".service": name + ".service",
		"/usr/lib/sysusers.d/" + name + ".conf":        name + ".sysusers",
		"/etc/" + name + "/config.yaml":                "config.yaml",
	} {
		want, err := os.ReadFile(filepath.Join("../../cmd", name, source))
		if err != nil || !bytes.Equal(data[path].content, want) {
			t.Errorf("%s is not cmd/%s/%s: %v", path, name, source, err)
		}
	}
	// What the unit starts and reads is what is installed.
	unit := string(data["/usr/lib/systemd/system/"+name+".service"].content)
	start := regexp.MustCompile(`(?m)^ExecStart=(\S+) .*--config (\S+)`).FindStringSubmatch(unit)
	if start == nil || data[start[1]].Header == nil || data[start[2]].Header == nil {
		t.Errorf("the unit starts %q, which is not all installed", start)
	}
}

type file struct {
	*tar.Header
	content []byte
}

// open reads a package: an ar archive with two tar archives in it, whose
// names end with how they are compressed. Folders end with a slash.
func open(t *testing.T, path string) (control, data map[string]file) {
	t.Helper()
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	rest, ok := bytes.CutPrefix(raw, []byte("!<arch>\n"))
	if !ok {
		t.Fatal("not an ar archive")
	}
	var names []string
	members := map[string]map[string]file{}
	for len(rest) > 0 {
		if len(rest) < 60 || string(rest[58:60]) != "`\n" {
			t.Fatalf("after %v there is no ar header", names)
		}
		name := strings.TrimRight(string(rest[:16]), " /")
		size, err := strconv.Atoi(strings.TrimSpace(string(rest[48:58])))
		if err != nil || size > len(rest)-60 {
			t.Fatalf("%s has size %q", name, rest[48:58])
		}
		names = append(names, name)
		content := rest[60 : 60+size]
		rest = rest[min(len(rest), 60+size+size%2):]
		if name == "debian-binary" {
			if string(content) != "2.0\n" {
				t.Errorf("debian-binary is %q", content)
			}
			continue
		}
		base, by, _ := strings.Cut(name, ".tar.")
		unpack, ok := map[string]string{"gz": "gzip", "xz": "xz"}[by]
		if !ok {
			t.Fatalf("%s is compressed by something else", name)
		}
		cmd := exec.CommandContext(t.Context(), unpack, "-dc")
		cmd.Stdin = bytes.NewReader(content)
		plain, err := cmd.Output()
		if err != nil {
			t.Fatalf("%s: %v", unpack, err)
		}
		members[base] = untar(t, plain)
	}
	if len(names) != 3 || names[0] != "debian-binary" || members["control"] == nil || members["data"] == nil {
		t.Fatalf("the archive has %v", names)
	}
	return members["control"], members["data"]
}

func untar(t *testing.T, raw []byte) map[string]file {
	t.Helper()
	files := map[string]file{}
	for r := tar.NewReader(bytes.NewReader(raw)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		name := "/" + strings.TrimPrefix(strings.TrimPrefix(h.Name, "."), "/")
		if h.Typeflag != tar.TypeReg && h.Typeflag != tar.TypeDir {
			t.Errorf("%s is of type %q", name, h.Typeflag)
		}
		files[name] = file{h, content}
	}
}

// install has dpkg put the packages into a folder, with their scripts, and
// take them away again.
func install(t *testing.T, packages map[string]string) {
	for _, tool := range []string{"dpkg", "systemd-sysusers", "userdel"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("%s is not here: the packages are not installed", tool)
		}
	}
	if os.Getuid() != 0 {
		t.Skip("not root: the packages are not installed")
	}
	root := t.TempDir()
	for _, dir := range []string{"var/lib/dpkg/info", "var/lib/dpkg/updates", "var/lib/dpkg/triggers", "etc"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"var/lib/dpkg/status", "var/lib/dpkg/available"} {
		if err := os.WriteFile(filepath.Join(root, name), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	dpkg := func(args ...string) string {
		t.Helper()
		args = append([]string{"--root=" + root, "--force-depends", "--force-script-chrootless", "--force-confold"}, args...)
		out, err := exec.CommandContext(t.Context(), "dpkg", args...).CombinedOutput()
		if err != nil {
			t.Fatalf("dpkg %v: %v\n%s", args, err, out)
		}
		return string(out)
	}
	owner := func(path, want string) {
		t.Helper()
		out, err := exec.CommandContext(t.Context(), "stat", "-c", "%u:%g %a", filepath.Join(root, path)).Output()
		if got := strings.TrimSpace(string(out)); err != nil || got != want {
			t.Errorf("%s is %s, not %s: %v", path, got, want, err)
		}
	}
	there := func(path string) bool {
		_, err := os.Lstat(filepath.Join(root, path))
		return err == nil
	}
	account := func(name string) (uid, gid string) {
		passwd, _ := os.ReadFile(filepath.Join(root, "etc/passwd"))
		m := regexp.MustCompile(`(?m)^` + name + `:[^:]*:(\d+):(\d+):[^:]*:/var/lib/` + name + `:\S*/nologin$`).FindSubmatch(passwd)
		if m == nil {
			return "", ""
		}
		return string(m[1]), string(m[2])
	}

	dpkg("-i", packages["dunlin"], packages["dunlin-agent"], packages["dunlin-controller"])
	for _, name := range daemons {
		_, gid := account(name)
		if gid == "" || gid == "0" {
			t.Fatalf("there is no user %s", name)
		}
		owner("/etc/"+name, "0:"+gid+" 750")
		owner("/etc/"+name+"/config.yaml", "0:"+gid+" 640")
		if there("/etc/systemd/system/multi-user.target.wants/" + name + ".service") {
			t.Errorf("%s would be started at boot, before anybody has configured it", name)
		}
		// As the daemon and an operator would.
		for path, text := range map[string]string{"/var/lib/" + name + "/state.db": "x", "/etc/" + name + "/join-token": "x", "/etc/" + name + "/config.yaml": "listen: 127.0.0.1:9000\n"} {
			if err := os.MkdirAll(filepath.Dir(filepath.Join(root, path)), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(root, path), []byte(text), 0o640); err != nil {
				t.Fatal(err)
			}
		}
	}

	// Again, as an upgrade would: settings stay.
	dpkg("-i", packages["dunlin-agent"], packages["dunlin-controller"])
	for _, name := range daemons {
		_, gid := account(name)
		owner("/etc/"+name+"/config.yaml", "0:"+gid+" 640")
		owner("/etc/"+name+"/join-token", "0:"+gid+" 640")
		if text, err := os.ReadFile(filepath.Join(root, "etc", name, "config.yaml")); err != nil || string(text) != "listen: 127.0.0.1:9000\n" {
			t.Errorf("after an upgrade %s has the settings %q, %v", name, text, err)
		}
	}

	dpkg("-r", "dunlin-agent", "dunlin-controller", "dunlin")
	for _, name := range daemons {
		for path, want := range map[string]bool{
			"/usr/bin/" + name: false, "/usr/lib/systemd/system/" + name + ".service": false,
			"/etc/" + name + "/config.yaml": true, "/var/lib/" + name + "/state.db": true,
		} {
			if there(path) != want {
				t.Errorf("after removal, %s is there: %v", path, !want)
			}
		}
	}

	out := dpkg("--purge", "dunlin-agent", "dunlin-controller")
	if there("/etc/dunlin-agent") || there("/etc/dunlin-controller") || there("/var/lib/dunlin-agent") || there("/usr/lib/dunlin") {
		t.Error("a purge leaves files")
	}
	if uid, _ := account("dunlin-agent"); uid != "" {
		t.Error("a purge leaves the agent's user")
	}
	if groups, _ := os.ReadFile(filepath.Join(root, "etc/group")); bytes.Contains(groups, []byte("dunlin-agent")) {
		t.Errorf("a purge leaves the agent's group:\n%s", groups)
	}
	uid, _ := account("dunlin-controller")
	if !there("/var/lib/dunlin-controller/state.db") || uid == "" || !strings.Contains(out, "/var/lib/dunlin-controller stays") {
		t.Errorf("the controller's data did not survive a purge, or it was not said:\n%s", out)
	}
	if installed := dpkg("-l"); strings.Contains(installed, "dunlin") {
		t.Error(fmt.Sprint("still there:\n", installed))
	}
	if left, err := filepath.Glob(filepath.Join(root, "usr/*/dunlin*")); err != nil || slices.ContainsFunc(left, func(string) bool { return true }) {
		t.Errorf("left: %v, %v", left, err)
	}
}
