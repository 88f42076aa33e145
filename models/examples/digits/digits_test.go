package digits

import (
	"crypto/sha256"
	"fmt"
	"io/fs"
	"os"
	"regexp"
	"testing"
)

func TestHeldOut(t *testing.T) {
	images, labels := HeldOut()
	if len(images) != 600 || len(labels) != 600 {
		t.Fatalf("got %d images and %d labels, want 600 of each", len(images), len(labels))
	}
	var count [10]int
	for i, label := range labels {
		if label < 0 || label > 9 {
			t.Fatalf("label %d is %d", i, label)
		}
		count[label]++
		var lit int
		for j, p := range images[i] {
			if p < 0 || p > 16 || p != float32(int(p)) {
				t.Fatalf("image %d, pixel %d is %v", i, j, p)
			}
			if p > 0 {
				lit++
			}
		}
		if lit < 16 {
			t.Errorf("image %d has only %d pixels that are not 0", i, lit)
		}
	}
	for digit, n := range count {
		if n < 50 {
			t.Errorf("digit %d occurs only %d times", digit, n)
		}
	}
	// Row 3 of the first held-out image, and its label, as load_digits has them.
	if got, want := [8]float32(images[0][24:32]), ([8]float32{0, 0, 11, 16, 2, 0, 0, 0}); got != want {
		t.Errorf("image 0, row 3 = %v, want %v", got, want)
	}
	if labels[0] != 8 {
		t.Errorf("label 0 = %d, want 8", labels[0])
	}
}

func TestModels(t *testing.T) {
	for _, name := range []string{"v1.onnx", "v2.onnx", "v3-bad.onnx"} {
		info, err := fs.Stat(Models, name)
		if err != nil {
			t.Fatal(err)
		}
		if info.Size() == 0 || info.Size() >= 1<<20 {
			t.Errorf("%s has %d bytes, want less than 1 MiB", name, info.Size())
		}
	}
}

// The model card lists the SHA-256 of every file that train.py writes.
func TestModelCardDigests(t *testing.T) {
	card, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	lines := regexp.MustCompile(`(?m)^([0-9a-f]{64})  (\S+)$`).FindAllStringSubmatch(string(card), -1)
	if len(lines) != 6 {
		t.Fatalf("README.md lists %d digests, want 6", len(lines))
	}
	for _, line := range lines {
		file, err := os.ReadFile(line[2])
		if err != nil {
			t.Fatal(err)
		}
		if got := fmt.Sprintf("%x", sha256.Sum256(file)); got != line[1] {
			t.Errorf("SHA-256 of %s is %s, README.md says %s", line[2], got, line[1])
		}
	}
}
