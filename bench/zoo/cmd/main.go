// Command cmd writes the nets of package zoo into a folder.
package main

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/dunlin/dunlin/bench/zoo"
)

func main() {
	dir := flag.String("o", ".", "folder to write NAME.onnx into")
	seed := flag.Uint64("seed", 1, "seed of the weights")
	flag.Usage = func() {
		fmt.Fprintln(os.Stderr, "usage: go run ./bench/zoo/cmd [-o DIR] [-seed N] [NAME ...]")
		for _, n := range zoo.Nets(*seed) {
			fmt.Fprintf(os.Stderr, "  %-10s %s, %d parameters\n", n.Name, n.About, n.Parameters())
		}
		flag.PrintDefaults()
	}
	flag.Parse()
	if err := write(*dir, *seed, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "zoo:", err)
		os.Exit(1)
	}
}

// write writes the nets of these names, or all.
func write(dir string, seed uint64, names []string) error {
	all := zoo.Nets(seed)
	var known []string
	for _, n := range all {
		known = append(known, n.Name)
	}
	for _, name := range names {
		if !slices.Contains(known, name) {
			return fmt.Errorf("no net has the name %q; there are %s", name, strings.Join(known, ", "))
		}
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for _, n := range all {
		if len(names) > 0 && !slices.Contains(names, n.Name) {
			continue
		}
		path := filepath.Join(dir, n.Name+".onnx")
		if err := n.WriteFile(path); err != nil {
			return err
		}
		fmt.Printf("%s: %s, %d parameters\n", path, n.About, n.Parameters())
	}
	return nil
}
