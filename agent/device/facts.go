package device

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"unicode"

	profiles "github.com/dunlin/dunlin/firmware-profiles"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// Limits of what boards say of themselves. What is beyond does not count.
const (
	maxIdentity   = 4096 // bytes of a file
	maxCompatible = 32   // entries of the device tree's "compatible"
)

// Facts are what the firmware profiles go by: info's architecture, GPUs,
// driver and runtime, and what the board says of itself.
func Facts(info *dunlinv1.DeviceInfo) profiles.Facts { return factsAt("/", info) }

// factsAt is Facts with /proc and /sys below root.
func factsAt(root string, info *dunlinv1.DeviceInfo) profiles.Facts {
	b := readBoard(root)
	f := profiles.Facts{Arch: info.GetArch(), DeviceTree: b.compatible, DMI: b.dmi(), Driver: info.GetDriverVersion(), Runtime: info.GetRuntimeVersion()}
	if b.model != "" {
		f.DeviceTree = append(f.DeviceTree, b.model)
	}
	for _, g := range info.GetGpus() {
		f.GPUs = append(f.GPUs, profiles.GPU{Name: g.GetName(), ComputeCapability: g.GetComputeCapability()})
	}
	return f
}

// board is what one says of itself: by a device tree, as most that are not
// PCs, or by DMI.
type board struct {
	compatible      []string // the most specific first
	model           string
	vendor, product string
}

func readBoard(root string) board {
	read := func(path string) string { return identity(filepath.Join(root, path)) }
	return board{
		compatible: entries(read("proc/device-tree/compatible")),
		model:      printable(read("proc/device-tree/model")),
		vendor:     printable(read("sys/class/dmi/id/sys_vendor")),
		product:    printable(read("sys/class/dmi/id/product_name")),
	}
}

// identity reads a file, or "" where that cannot be done.
func identity(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxIdentity))
	if err != nil {
		return ""
	}
	return string(b)
}

// dmi gives vendor and product as one string: a slash only stands between
// them.
func (b board) dmi() string {
	if b.vendor == "" && b.product == "" {
		return ""
	}
	return strings.ReplaceAll(b.vendor, "/", "-") + "/" + strings.ReplaceAll(b.product, "/", "-")
}

// String gives what the board says that it is: the device tree's model, or
// DMI's vendor and product; "" where it says nothing.
func (b board) String() string {
	if b.model != "" {
		return b.model
	}
	return strings.TrimSpace(b.vendor + " " + b.product)
}

// entries takes the device tree's lists apart, whose entries end with a zero.
func entries(list string) []string {
	var all []string
	for e := range strings.SplitSeq(list, "\x00") {
		if e = printable(e); e != "" && len(all) < maxCompatible {
			all = append(all, e)
		}
	}
	return all
}

// printable gives the text before the first zero, without what cannot be
// printed, and without space around it.
func printable(s string) string {
	s, _, _ = strings.Cut(s, "\x00")
	return strings.TrimSpace(strings.Map(func(r rune) rune {
		if r == unicode.ReplacementChar || !unicode.IsPrint(r) {
			return -1
		}
		return r
	}, s))
}
