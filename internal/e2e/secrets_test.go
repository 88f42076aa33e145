package e2e

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	_ "modernc.org/sqlite" // the agent's state

	"github.com/dunlin/dunlin/internal/link"
	"github.com/dunlin/dunlin/internal/pki"
	"github.com/dunlin/dunlin/internal/pki/pkitest"
	mqtt "github.com/eclipse/paho.mqtt.golang"
)

// secretText makes what looks like a token.
func secretText(prefix string) string {
	var b [32]byte
	rand.Read(b[:]) // never fails
	return prefix + base64.RawURLEncoding.EncodeToString(b[:])
}

// forms gives the bytes by which a secret would be found: as it is, in
// hexadecimal and in base64 at each place in a longer text, and so the bytes
// that it is made of.
func forms(secret string) (all [][]byte) {
	_, encoded, _ := strings.Cut(strings.TrimPrefix(secret, "dunlin_"), "join_")
	if encoded == "" {
		encoded = strings.TrimPrefix(secret, "dunlin_")
	}
	for _, raw := range [][]byte{[]byte(secret), decoded(encoded)} {
		if len(raw) < 16 {
			continue
		}
		text := hex.EncodeToString(raw)
		all = append(all, raw, []byte(text), []byte(strings.ToUpper(text)))
		for shift := range 3 {
			padded := append(make([]byte, shift), raw...)
			for _, e := range []*base64.Encoding{base64.RawStdEncoding, base64.RawURLEncoding} {
				text := e.EncodeToString(padded)
				all = append(all, []byte(text[4:len(text)-4])) // the ends depend on what is around
			}
		}
	}
	return all
}

func decoded(text string) []byte {
	if b, err := hex.DecodeString(text); err == nil {
		return b
	}
	b, err := base64.RawURLEncoding.DecodeString(text)
	if err != nil {
		return nil
	}
	return b
}

// finds says which secrets are in data.
func finds(secrets map[string]string, data []byte) (names []string) {
	for name, secret := range secrets {
		if slices.ContainsFunc(forms(secret), func(form []byte) bool { return bytes.Contains(data, form) }) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

func TestFinds(t *testing.T) {
	for name, secret := range map[string]string{"token": secretText("dunlin_"), "join token": secretText("dunlin_join_"), "device": secretText(""), "hex": hex.EncodeToString([]byte(rand.Text()))} {
		secrets := map[string]string{name: secret}
		raw := decoded(strings.TrimPrefix(strings.TrimPrefix(secret, "dunlin_"), "join_"))
		for _, text := range []string{
			secret, "x" + secret + "y", fmt.Sprintf("%x", secret), fmt.Sprintf("%X", raw), string(raw), base64.StdEncoding.EncodeToString(raw),
			base64.StdEncoding.EncodeToString([]byte("cam-1:" + secret)), base64.URLEncoding.EncodeToString([]byte("cam-10:" + secret + "z")),
		} {
			if len(finds(secrets, []byte(text))) != 1 {
				t.Errorf("%s is not found in %q", name, text)
			}
		}
		if len(finds(secrets, []byte(secretText("dunlin_")))) != 0 {
			t.Errorf("%s is found in another", name)
		}
	}
}

// commandLines collects those of all processes until stop.
func commandLines() (stop func() []byte) {
	quit := make(chan struct{})
	lines := map[string]bool{}
	var running sync.WaitGroup
	running.Go(func() {
		for {
			paths, _ := filepath.Glob("/proc/[0-9]*/cmdline")
			for _, p := range paths {
				b, err := os.ReadFile(p)
				if err == nil { // else the process has ended
					lines[string(b)] = true
				}
			}
			select {
			case <-quit:
				return
			case <-time.After(10 * time.Millisecond):
			}
		}
	})
	return func() []byte {
		close(quit)
		running.Wait()
		return []byte(strings.ReplaceAll(strings.Join(slices.Collect(maps.Keys(lines)), "\n"), "\x00", " "))
	}
}

// wrapped gives a script that runs a program in a folder, with core files of
// any size, which the runtime is asked for when it crashes.
func wrapped(t *testing.T, dir, program string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), filepath.Base(program))
	script := fmt.Sprintf("#!/bin/sh\ncd %s || exit 9\nulimit -c unlimited\nGOTRACEBACK=crash exec %s \"$@\"\n", dir, program)
	if err := os.WriteFile(path, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestSecretsStayWhereTheyBelong uses every secret there is, rightly and
// wrongly, crashes the programs, and looks for the secrets in all that is left
// behind: they are in the files that hold them, which nobody else can read,
// and nowhere else.
func TestSecretsStayWhereTheyBelong(t *testing.T) {
	dir := t.TempDir()
	// Whether there can be core files at all depends on the machine.
	crashed := exec.Command("sh", "-c", "ulimit -c unlimited; kill -ABRT $$")
	crashed.Dir = t.TempDir()
	_ = crashed.Run()
	cores, _ := filepath.Glob(filepath.Join(crashed.Dir, "*core*"))
	t.Logf("a program that does not hide its memory leaves %d core files in its folder", len(cores))

	lines := commandLines()
	secrets := map[string]string{} // by name
	said := map[string][]byte{}    // what programs and servers said, by what was asked
	say := func(what string, b []byte) {
		said[fmt.Sprintf("%s (%d)", what, len(said))] = b
	}

	f, err := NewFleet(Programs{Agent: wrapped(t, dir, programs.Agent), Controller: wrapped(t, dir, programs.Controller), CLI: programs.CLI}, dir, library)
	if err != nil {
		t.Fatal(err)
	}
	f.ControllerArgs = []string{"--log-level", "debug"}
	t.Cleanup(func() { stop(t, f) })
	if err := f.StartController(within(t)); err != nil {
		t.Fatalf("%v\n%s", err, f.Controller.LogTail(50))
	}
	secrets["admin token"] = f.Token
	run := func(want bool, env []string, program string, args ...string) {
		t.Helper()
		cmd := exec.CommandContext(within(t), program, args...)
		cmd.Env = append(append(os.Environ(), "XDG_CONFIG_HOME="+dir), env...)
		b, err := cmd.CombinedOutput()
		if (err == nil) != want {
			t.Errorf("%s %s: %v\n%s", filepath.Base(program), strings.Join(args, " "), err, b)
		}
		say(filepath.Base(program)+" "+strings.Join(args, " "), b)
	}
	dunlin := func(args ...string) { t.Helper(); run(true, nil, f.Programs.CLI, args...) }
	http1 := func(want int, method, url, authorization, body string) {
		t.Helper()
		req, err := http.NewRequestWithContext(within(t), method, url, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		if authorization != "" {
			req.Header.Set("Authorization", authorization)
		}
		req.Header.Set("Content-Type", "application/json")
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		// So many wrong credentials are slowed, too.
		if resp.StatusCode != want && (want < 400 || resp.StatusCode != http.StatusTooManyRequests) {
			t.Errorf("%s %s: %s: %s", method, url, resp.Status, b)
		}
		say(method+" "+url, fmt.Appendf(nil, "%v\n%s", resp.Header, b))
	}

	// Rightly.
	dunlin("login", f.URL, "--token-file", filepath.Join(dir, "controller", "admin-token"))
	apiKey := secretText("")
	secrets["API key"] = apiKey
	keyFile := filepath.Join(dir, "api-keys")
	if err := os.WriteFile(keyFile, []byte(apiKey+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	a, err := f.StartAgent(within(t), "cam-1", "--log-level", "debug", "--api-keys", keyFile)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(dir, "cam-1.join-token"))
	if err != nil {
		t.Fatal(err)
	}
	secrets["join token"] = strings.TrimSpace(string(b))
	if b, err = os.ReadFile(filepath.Join(dir, "controller", "registry", "upload-secret")); err != nil {
		t.Fatal(err)
	}
	secrets["upload key"] = string(b)
	dunlin("push", digitsFile("v1"), "digits")
	dunlin("apply", "-f", document(t, f, "digits", 1))
	dunlin("rollout", "status", "digits", "--wait", "--timeout", limit.String())
	keys := map[string]string{ // files by what they hold
		"device key":    filepath.Join(a.Data, "device.key"),
		"authority key": filepath.Join(dir, "controller", "ca", pki.CertificateID(authority(t, f).Certificate)+".key"),
	}
	for name, path := range keys {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		block, _ := pem.Decode(text)
		parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		scalar, err := parsed.(*ecdsa.PrivateKey).Bytes()
		if err != nil {
			t.Fatal(err)
		}
		secrets[name], secrets[name+", raw"] = strings.Split(string(text), "\n")[1], string(scalar)
	}
	image := `{"inputs": [{"name": "image", "datatype": "FP32", "shape": [1, 1, 8, 8], "data": [` + strings.Repeat("0,", 63) + `0]}]}`
	infer := func(want int, authorization string) {
		t.Helper()
		http1(want, http.MethodPost, a.URL+"/v2/models/digits-route/infer", authorization, image)
	}
	infer(http.StatusOK, "Bearer "+apiKey)
	manifest := "/v2/digits/manifests/1"
	http1(http.StatusOK, http.MethodGet, f.URL+manifest, "Bearer "+f.Token, "")

	// Wrongly. A wrong secret may be one of another place, or have a slip.
	wrong := map[string]string{"wrong token": secretText("dunlin_"), "wrong join token": secretText("dunlin_join_"), "wrong secret": secretText(""), "wrong API key": secretText("")}
	maps.Copy(secrets, wrong)
	const listModels, join = "/dunlin.v1.ModelService/ListModels", "/dunlin.v1.EnrollmentService/Join"
	_, csr := pkitest.Request(t, "cam-2")
	request := base64.StdEncoding.EncodeToString(csr)
	for _, name := range slices.Sorted(maps.Keys(secrets)) {
		secret := secrets[name]
		if strings.HasSuffix(name, ", raw") { // of no use in text
			continue
		}
		tokenFile := filepath.Join(t.TempDir(), "token")
		if err := os.WriteFile(tokenFile, []byte(secret), 0o600); err != nil {
			t.Fatal(err)
		}
		if secret != f.Token {
			run(false, nil, f.Programs.CLI, "login", f.URL, "--token-file", tokenFile)
			run(false, []string{"DUNLIN_TOKEN=" + secret, "DUNLIN_URL=" + f.URL}, f.Programs.CLI, "get", "devices")
			run(false, []string{"DUNLIN_TOKEN=" + secret, "DUNLIN_URL=" + f.URL}, f.Programs.CLI, "push", digitsFile("v2"), "digits")
			http1(http.StatusUnauthorized, http.MethodPost, f.URL+listModels, "Bearer "+secret, "{}")
			http1(http.StatusUnauthorized, http.MethodGet, f.URL+manifest, "Bearer "+secret, "")
			http1(http.StatusUnauthorized, http.MethodGet, f.URL+manifest, "Basic "+base64.StdEncoding.EncodeToString([]byte("cam-2:"+secret)), "")
		}
		http1(http.StatusUnauthorized, http.MethodGet, f.URL+manifest, secret, "")
		if secret != apiKey {
			infer(http.StatusUnauthorized, "Bearer "+secret)
		}
		http1(http.StatusForbidden, http.MethodPost, f.URL+join, "", fmt.Sprintf(`{"joinToken": %q, "name": "cam-2", "csr": %q}`, secret, request))
		http1(http.StatusBadRequest, http.MethodPost, f.URL+join, "", fmt.Sprintf(`{"joinToken": %q, "name": "cam 2", "csr": %q}`, secret, request))
		o := mqtt.NewClientOptions().AddBroker("ssl://" + f.MQTT).SetClientID("cam-2").SetUsername(link.TokenUser(secret)).SetPassword(secret).
			SetTLSConfig(pkitest.ClientTLS(authority(t, f), nil)).SetProtocolVersion(4).SetAutoReconnect(false).SetConnectTimeout(limit)
		if token := mqtt.NewClient(o).Connect(); token.Wait() && token.Error() == nil && name != "join token" {
			t.Errorf("the broker let a stranger in with the %s", name)
		} else if token.Error() != nil {
			say("broker", []byte(token.Error().Error()))
		}
		run(false, nil, f.Programs.Agent, "--data", filepath.Join(dir, "cam-2"), "--controller", f.DeviceURL(), "--ca", filepath.Join(dir, "controller", "ca.pem"), "--join-token", "@"+tokenFile, "--name", "cam-2",
			"--listen", "127.0.0.1:0", "--grpc-listen", "127.0.0.1:0", "--runtime-lib", library, "--log-level", "debug")
		bad := filepath.Join(filepath.Dir(tokenFile), "agent.yaml")
		if err := os.WriteFile(bad, []byte("join-token: "+secret+"\nnome: x\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		run(false, nil, f.Programs.Agent, "--config", bad)
	}

	// Crash both.
	for _, p := range []*Process{a.Process, f.Controller} {
		limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", p.PID()))
		if err != nil || !strings.Contains(strings.Join(strings.Fields(string(limits)), " "), "Max core file size 0 0 bytes") {
			t.Errorf("%s may write core files: %v\n%s", p.Name, err, limits)
		}
		if err := p.cmd.Process.Signal(syscall.SIGABRT); err != nil {
			t.Fatal(err)
		}
		select {
		case <-p.Done():
		case <-within(t).Done():
			t.Fatalf("%s outlives SIGABRT", p.Name)
		}
		if log, err := os.ReadFile(p.Log); err != nil || !bytes.Contains(log, []byte("SIGABRT")) {
			t.Errorf("%s left no trace of the crash: %v", p.Name, err)
		}
	}
	if err := f.StartController(within(t)); err != nil {
		t.Fatal(err)
	}
	if err := f.RestartAgent(within(t), a); err != nil {
		t.Fatal(err)
	}
	if err := f.Controller.Stop(); err != nil { // writes what was refused
		t.Error(err)
	}
	if err := f.StartController(within(t)); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() string {
		if all := devices(t, f); len(all) == 1 && all[0].Connected {
			return ""
		}
		return "the device is not connected"
	})
	eventually(t, func() string {
		if versions := devices(t, f)[0].Reported.Versions; len(versions) == 1 && versions[0].Serving {
			return ""
		}
		return "the version is not served again"
	})
	infer(http.StatusOK, "Bearer "+apiKey)

	// What can be seen.
	for _, what := range [][]string{
		{"audit", "list", "--limit", "1000", "-o", "json"}, {"audit", "export"}, {"audit", "verify"}, {"get", "devices", "-o", "json"}, {"get", "events", "-o", "json"},
		{"get", "join-tokens", "-o", "json"}, {"get", "models", "-o", "json"},
	} {
		dunlin(what...)
	}
	run(true, nil, f.Programs.Agent, "doctor", "--data", a.Data, "--runtime-lib", library, "--listen", strings.TrimPrefix(a.URL, "http://"))
	http1(http.StatusOK, http.MethodGet, f.URL+"/metrics", "", "")
	http1(http.StatusOK, http.MethodGet, a.URL+"/metrics", "Bearer "+apiKey, "")
	stop(t, f)
	f.Agents, f.Controller = nil, nil

	seen := lines()
	for _, want := range []string{"dunlin-agent", "dunlin-controller", "@" + filepath.Join(dir, "cam-1.join-token")} {
		if !bytes.Contains(seen, []byte(want)) {
			t.Errorf("the command lines of the processes lack %s", want)
		}
	}
	say("command lines", seen)
	for what, b := range said {
		if found := finds(secrets, b); len(found) > 0 {
			t.Errorf("%s holds %v:\n%s", what, found, b)
		}
	}

	// The files that hold secrets, by design.
	mayHold := map[string]string{
		"controller/admin-token":            "admin token",
		"dunlin/config.yaml":                "admin token",
		"controller/registry/upload-secret": "upload key",
		"api-keys":                          "API key",
		"cam-1.join-token":                  "join token",
	}
	for name, path := range keys {
		if path, err = filepath.Rel(dir, path); err != nil {
			t.Fatal(err)
		}
		mayHold[path] = name
	}
	looked := 0
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		looked++
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		if strings.HasPrefix(name, "core") { // which can be huge
			t.Errorf("there is a core file %s", name)
			return nil
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		found := finds(secrets, b)
		if may, ok := mayHold[name]; ok {
			found = slices.DeleteFunc(found, func(s string) bool { return s == may })
			if info.Mode().Perm() != 0o600 {
				t.Errorf("%s holds the %s and has mode %o", name, may, info.Mode().Perm())
			}
		}
		if len(found) > 0 {
			t.Errorf("%s holds %v", name, found)
		}
		return nil
	})
	if err != nil || looked < 15 {
		t.Errorf("looked at %d files: %v", looked, err)
	}
	t.Logf("looked for %d secrets in %d files and %d outputs", len(secrets), looked, len(said))
}
