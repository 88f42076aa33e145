package main

import (
	"context"
	"errors"
	"flag"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/dunlin/dunlin/agent"
	"github.com/dunlin/dunlin/agent/sim"
	"github.com/dunlin/dunlin/agent/simfleet"
	"github.com/dunlin/dunlin/controller"
	"github.com/dunlin/dunlin/controller/broker"
	"github.com/dunlin/dunlin/controller/fleet"
	profiles "github.com/dunlin/dunlin/firmware-profiles"
)

// document is a page for users.
type document struct {
	path   string
	blocks []block // what is fenced
	text   string  // the rest
}

type block struct{ language, text string }

func readPages(t *testing.T) []document {
	t.Helper()
	paths, err := filepath.Glob("../../docs/*.md")
	if err != nil || len(paths) == 0 {
		t.Fatalf("no docs: %v", err)
	}
	var pages []document
	for _, path := range append(paths, "../../README.md", "../../CHANGELOG.md") {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		p := document{path: path}
		for i, part := range strings.Split("\n"+string(b), "\n```") {
			if i%2 == 0 {
				p.text += part
				continue
			}
			language, text, _ := strings.Cut(part, "\n")
			p.blocks = append(p.blocks, block{language, text + "\n"})
		}
		pages = append(pages, p)
	}
	return pages
}

// TestDocsCommands: each command line in the documents is one that the
// programs take, and what is named in the text exists.
func TestDocsCommands(t *testing.T) {
	b, err := os.ReadFile("../../Makefile")
	if err != nil {
		t.Fatal(err)
	}
	c := commands{makefile: string(b)}
	checked := 0
	pages := readPages(t)
	// Where the documents put the join token.
	t.Chdir(t.TempDir())
	if err := os.WriteFile("token", []byte("dunlin_join_x\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile("faults.yaml", []byte("- {at: 1m, network: cut}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, p := range pages {
		var lines []string
		for _, b := range p.blocks {
			for line := range strings.Lines(strings.ReplaceAll(b.text, "\\\n", " ")) {
				line, prompt := strings.CutPrefix(strings.TrimSpace(line), "$ ")
				if b.language == "sh" || b.language == "console" && prompt {
					lines = append(lines, line)
				}
			}
		}
		for _, line := range lines {
			checked++
			if err := c.check(line, true); err != nil {
				t.Errorf("%s: %s: %v", p.path, line, err)
			}
		}
		for _, m := range regexp.MustCompile("`([^`\n]+)`").FindAllStringSubmatch(p.text, -1) {
			if err := c.check(m[1], false); err != nil {
				t.Errorf("%s: `%s`: %v", p.path, m[1], err)
			}
			if name, _, _ := strings.Cut(m[1], " "); strings.HasPrefix(name, "--") && name != "---" && !c.flag(name) {
				t.Errorf("%s: no program has the flag %s", p.path, name)
			}
		}
	}
	if checked < 20 {
		t.Errorf("found only %d command lines", checked)
	}
	for _, bad := range []string{"dunlin teapot", "dunlin get devices --teapot", "dunlin get", "make teapot", "dunlin-agent --teapot x", "dunlin-controller --teapot x", "dunlin-agent teapot", "dunlin device teapot x"} {
		if c.check(bad, true) == nil {
			t.Errorf("%s: not noticed", bad)
		}
	}
}

type commands struct{ makefile string }

// check says whether the programs would take a command line. Of one that is
// not whole, only the verb and the flags are looked at.
func (c commands) check(line string, whole bool) error {
	line, _, _ = strings.Cut(line, " #")
	words := strings.Fields(line)
	if i := slices.IndexFunc(words, func(w string) bool { return w == ">" || w == "|" || w == "&" }); i >= 0 {
		words = words[:i]
	}
	if len(words) == 0 {
		return nil
	}
	none := func(string) string { return "" }
	args := slices.Clone(words[1:])
	for i, a := range args {
		if strings.HasPrefix(a, "@") { // a file that the programs read
			args[i] = "@/dev/null"
		}
	}
	switch words[0] {
	case "dunlin":
		cmd, err := verb(args, whole)
		if err == nil && whole {
			err = cmd.ValidateArgs(cmd.Flags().Args())
		}
		return err
	case "dunlin-agent":
		if len(args) > 0 && args[0] == "serve" {
			if !whole && len(args) == 1 {
				args = append(args, "model.onnx")
			}
			_, err := agent.ParseAlone(args[1:], none, io.Discard)
			return err
		}
		if len(args) > 0 && args[0] == "simulate" {
			if !whole && len(args) == 1 {
				return nil
			}
			return simfleet.Check(words[2:], none)
		}
		if len(args) > 0 && slices.Contains([]string{"run", "doctor", "version"}, args[0]) {
			args = args[1:]
		}
		if n := len(args) - 1; n > 0 && (args[0] == "verify" || args[0] == "import") && !strings.HasPrefix(args[n], "-") {
			args = args[1:n] // the file or folder
		}
		_, err := agent.ParseConfig(args, none, io.Discard)
		return err
	case "dunlin-controller":
		if len(args) > 2 && slices.Equal(args[:3], []string{"broker", "config", "mosquitto"}) {
			if !whole {
				args = append(args, "--dir", "d", "--host", "h")
			}
			_, err := controller.LoadMosquittoConfig(args[3:], none, io.Discard)
			return err
		}
		if len(args) > 0 && (args[0] == "backup" || args[0] == "restore") {
			if !whole && len(args) == 1 {
				args = append(args, "FILE")
			}
			_, err := controller.LoadBackupConfig(args[0], args[1:], none, io.Discard)
			return err
		}
		_, err := controller.LoadConfig(args, none, io.Discard)
		return err
	case "make":
		if !strings.Contains(c.makefile, "\n"+args[0]+": ") {
			return usagef("there is no target %q", args[0])
		}
	}
	return nil
}

// verb gives the command that args name, with its flags read. Where args are
// not whole, a flag may lack its value.
func verb(args []string, whole bool) (*cobra.Command, error) {
	root := new(cli).root()
	root.InitDefaultCompletionCmd()
	cmd, rest, err := root.Find(args)
	if err != nil {
		return nil, err
	}
	if cmd.HasSubCommands() && cmd != root && whole {
		return nil, usagef("%s needs a command", cmd.CommandPath())
	}
	if whole {
		return cmd, cmd.ParseFlags(rest)
	}
	for _, word := range rest {
		name, long := strings.CutPrefix(word, "--")
		if long && cmd.Flags().Lookup(name) == nil {
			return nil, usagef("%s has no flag %s", cmd.CommandPath(), word)
		}
	}
	return cmd, nil
}

// flag says whether one of the programs has a flag.
func (c commands) flag(name string) bool {
	found := false
	var walk func(*cobra.Command)
	walk = func(cmd *cobra.Command) {
		cmd.Flags().VisitAll(func(f *pflag.Flag) { found = found || "--"+f.Name == name })
		for _, sub := range cmd.Commands() {
			walk(sub)
		}
	}
	walk(new(cli).root())
	var help strings.Builder
	none := func(string) string { return "" }
	if _, err := agent.ParseConfig([]string{"--help"}, none, &help); err == nil {
		return false
	}
	if _, err := agent.ParseAlone([]string{"--help"}, none, &help); err == nil {
		return false
	}
	if err := simfleet.Main(context.Background(), []string{"--help"}, none, &help); err != nil {
		return false
	}
	if _, err := controller.LoadMosquittoConfig([]string{"--help"}, none, &help); err == nil {
		return false
	}
	if _, err := controller.LoadConfig([]string{"--help"}, none, &help); err == nil {
		return false
	}
	return found || strings.Contains(help.String(), "  "+name+" ")
}

// TestDocsYAML: documents and profiles are valid, and configurations are taken.
func TestDocsYAML(t *testing.T) {
	none := func(string) string { return "" }
	kinds := map[string]int{}
	for _, p := range readPages(t) {
		for _, b := range p.blocks {
			if b.language != "yaml" {
				continue
			}
			first, _, _ := strings.Cut(b.text, "\n")
			var err error
			file := filepath.Join(t.TempDir(), "config.yaml")
			if err := os.WriteFile(file, []byte(b.text), 0o600); err != nil {
				t.Fatal(err)
			}
			switch first {
			case "# dunlin-agent --config":
				_, err = agent.ParseConfig([]string{"--config", file}, none, io.Discard)
			case "# dunlin-controller --config":
				_, err = controller.LoadConfig([]string{"--config", file}, none, io.Discard)
			case "# firmware profile packing-line":
				if err = os.Rename(file, filepath.Join(filepath.Dir(file), "packing-line.yaml")); err == nil {
					_, err = profiles.Load(filepath.Dir(file))
				}
			case "# dunlin-agent --sim-script":
				_, err = sim.ParseScript(file, []byte(b.text))
			case "# dunlin-agent simulate --script":
				_, err = simfleet.ParseScript(file, []byte(b.text))
			default:
				first = "document"
				_, err = fleet.Parse(b.text)
			}
			kinds[first]++
			if err != nil {
				t.Errorf("%s: %v\n%s", p.path, err, b.text)
			}
		}
	}
	if len(kinds) != 6 || kinds["document"] < 2 {
		t.Errorf("found only %v", kinds)
	}
}

// TestDocsACL: the ACL in the documents is the one that is tested.
func TestDocsACL(t *testing.T) {
	want, err := broker.MosquittoACL(nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range readPages(t) {
		for _, b := range p.blocks {
			if b.text == want {
				return
			}
		}
	}
	t.Errorf("docs/operate.md lacks\n%s", want)
}

// TestHelpIsNoFailure: --help of the daemons lists flags as the documents
// write them.
func TestHelpIsNoFailure(t *testing.T) {
	none := func(string) string { return "" }
	var help strings.Builder
	_, errAgent := agent.ParseConfig([]string{"-h"}, none, &help)
	_, errController := controller.LoadConfig([]string{"-h"}, none, &help)
	for _, err := range []error{errAgent, errController} {
		if !errors.Is(err, flag.ErrHelp) {
			t.Errorf("got %v", err)
		}
	}
	for _, want := range []string{"  --runtime-lib path ", "  --mqtt-listen "} {
		if !strings.Contains(help.String(), want) {
			t.Errorf("%q is missing in\n%s", want, &help)
		}
	}
}
