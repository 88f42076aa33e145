package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

// TestManual: each verb has a page, which has its flags; one source makes the
// same pages.
func TestManual(t *testing.T) {
	t.Setenv("SOURCE_DATE_EPOCH", "1796000000")
	dir, again := t.TempDir(), t.TempDir()
	must(t, "man", dir)
	must(t, "man", again)
	pages := 0
	var walk func(*cobra.Command)
	walk = func(cmd *cobra.Command) {
		name := strings.ReplaceAll(cmd.CommandPath(), " ", "-") + ".1"
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Error(err)
			return
		}
		pages++
		text := strings.ReplaceAll(string(b), `\-`, "-")
		for _, want := range []string{".TH", "SYNOPSIS", cmd.Short, "Nov 2026"} {
			if !strings.Contains(text, want) {
				t.Errorf("%s lacks %q", name, want)
			}
		}
		for line := range strings.Lines(cmd.LocalNonPersistentFlags().FlagUsages()) {
			if _, flag, ok := strings.Cut(line, "--"); ok {
				if flag = strings.Fields(flag)[0]; !strings.Contains(text, "--"+flag) && flag != "help" {
					t.Errorf("%s lacks --%s", name, flag)
				}
			}
		}
		second, err := os.ReadFile(filepath.Join(again, name))
		if err != nil || string(second) != string(b) {
			t.Errorf("%s differs the second time: %v", name, err)
		}
		for _, sub := range cmd.Commands() {
			if sub.IsAvailableCommand() && !sub.IsAdditionalHelpTopicCommand() {
				walk(sub)
			}
		}
	}
	walk(new(cli).root())
	if files, err := os.ReadDir(dir); err != nil || pages < 60 {
		t.Errorf("%d pages, %d files, %v", pages, len(files), err)
	}
	if code, _, stderr := dunlin(t, "man", filepath.Join(dir, "dunlin.1", "x")); code != exitError || !strings.Contains(stderr, "not a directory") {
		t.Errorf("exit code %d: %s", code, stderr)
	}
	t.Setenv("SOURCE_DATE_EPOCH", "yesterday")
	if code, _, stderr := dunlin(t, "man", dir); code != exitError || !strings.Contains(stderr, `SOURCE_DATE_EPOCH is "yesterday"`) {
		t.Errorf("exit code %d: %s", code, stderr)
	}
}
