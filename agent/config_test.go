package agent

import (
	"errors"
	"flag"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func env(pairs ...string) func(string) string {
	return func(name string) string {
		for i := 0; i < len(pairs); i += 2 {
			if pairs[i] == name {
				return pairs[i+1]
			}
		}
		return ""
	}
}

func TestConfigPrecedence(t *testing.T) {
	dir := t.TempDir()
	token := filepath.Join(dir, "token")
	file := filepath.Join(dir, "agent.yaml")
	for path, text := range map[string]string{
		token: "from-file\n",
		file:  "name: from-yaml\ndata: /from/yaml\nruntime-lib: from-yaml\nlabels: {site: yaml, line: a}\nlisten: 127.0.0.1:1\n",
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cfg, err := ParseConfig([]string{
		"--config", file, "--name", "from-flag", "--label", "site=flag", "--join-token", "@" + token, "--controller", "https://localhost:8080",
	}, env("DUNLIN_ORT_LIB", "from-env", "DUNLIN_JOIN_TOKEN", "from-env"), io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range [][3]string{
		{"name", cfg.Name, "from-flag"}, {"data", cfg.Data, "/from/yaml"}, {"runtime", cfg.RuntimeLib, "from-env"},
		{"site", cfg.Labels["site"], "flag"}, {"line", cfg.Labels["line"], "a"}, {"token", cfg.JoinToken, "from-file"},
		{"listen", cfg.Listen, "127.0.0.1:1"}, {"level", cfg.LogLevel, "info"},
	} {
		if c[1] != c[2] {
			t.Errorf("%s is %q, want %q", c[0], c[1], c[2])
		}
	}
}

func TestConfigFaultsTogether(t *testing.T) {
	_, err := ParseConfig([]string{
		"--name", "a b", "--listen", "0.0.0.0:8000", "--controller", "http://example.com", "--label", "bad key=x", "--log-level", "loud",
		"--join-token", "@/does/not/exist",
	}, env(), io.Discard)
	if err == nil {
		t.Fatal("no error")
	}
	for _, want := range []string{"name:", `listen: "0.0.0.0:8000" is not on loopback`, "controller:", `"bad key"`, `"loud"`, "join-token:"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not in: %v", want, err)
		}
	}
}

func TestConfigRefuses(t *testing.T) {
	for _, args := range [][]string{
		{"surplus"}, {"--label", "nokey"}, {"--config", "/does/not/exist"}, {"--unknown"},
		{"--controller", "http://localhost"}, {"--controller", "https://user@localhost"}, {"--ca", "/does/not/exist"}, {"--key-store", "cloud"}, {"--listen", "localhost"}, {"--listen", "[::]:80"},
	} {
		if cfg, err := ParseConfig(args, env(), io.Discard); err == nil {
			t.Errorf("%q gives %+v", args, cfg)
		}
	}
	var help strings.Builder
	if _, err := ParseConfig([]string{"--help"}, env(), &help); !errors.Is(err, flag.ErrHelp) || !strings.Contains(help.String(), "--") && !strings.Contains(help.String(), "-join-token") {
		t.Errorf("help: %v, %s", err, &help)
	}
}

func TestDeviceName(t *testing.T) {
	if got := deviceName("edge.example.org"); got != "edge-example-org" {
		t.Errorf("got %q", got)
	}
	if got := deviceName(strings.Repeat("é", 100)); len(got) > 64 || strings.Trim(got, "-") != "" {
		t.Errorf("got %q", got)
	}
}
