package models

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/dunlin/dunlin/models/tensor"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// noise gives n bytes that are always the same and do not compress.
func noise(n int, seed byte) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(b)
	return b
}

// largeModel has 3 MB of weights in its file and 2 MB beside it.
func largeModel(t testing.TB) string {
	graph := smallGraph().
		sub(5, rawTensor("big", 1, noise(3<<20, 1), 3<<18)).
		sub(5, externalTensor("beside", 1<<19, "location", "net.onnx.data"))
	return writeModel(t, modelOf(graph), map[string]string{"net.onnx.data": string(noise(2<<20, 2))})
}

func pack(t testing.TB, path string, labels ...string) *Bundle {
	t.Helper()
	b, err := Pack(t.Context(), path, PackOptions{Labels: labels})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestPack(t *testing.T) {
	path := largeModel(t)
	b := pack(t, path, "zero", "one")
	m, err := ParseManifest(b.ManifestBytes)
	if err != nil {
		t.Fatal(err)
	}
	if m.Digest != b.Digest || b.Digest != digest.FromBytes(b.ManifestBytes) {
		t.Errorf("digests %s, %s", m.Digest, b.Digest)
	}
	var size int64
	for i, f := range b.Files {
		content, err := os.ReadFile(f.Source)
		if err != nil {
			t.Fatal(err)
		}
		if f.Digest != digest.FromBytes(content) || f.Size != int64(len(content)) || m.Files[i] != f.File {
			t.Errorf("file %+v, in the manifest %+v", f, m.Files[i])
		}
		size += f.Size
	}
	if m.Size != size || m.Config.Digest != digest.FromBytes(b.ConfigBytes) || m.Index.Size != int64(len(b.IndexBytes)) {
		t.Errorf("manifest %+v", m)
	}
	c, err := ParseConfig(b.ConfigBytes)
	if err != nil {
		t.Fatal(err)
	}
	if c.Opsets == nil {
		c.Opsets = map[string]int64{} // JSON has none where it is empty
	}
	if b.Config.Costs == nil || c.Costs != nil {
		t.Errorf("costs: %v, in the bundle %v", b.Config.Costs, c.Costs)
	}
	b.Config.Costs = nil
	if !reflect.DeepEqual(*c, b.Config) || !reflect.DeepEqual(c.Labels, []string{"zero", "one"}) {
		t.Errorf("config\n%+v, want\n%+v", *c, b.Config)
	}
	if f, ok := m.File(c.Entry); !ok || f.Path != "model.onnx" {
		t.Errorf("entry %q is %+v", c.Entry, f)
	}
	if _, ok := m.File("net.onnx"); ok {
		t.Error("the bundle has the local name of the model")
	}
	index, err := ParseIndex(b.IndexBytes, m)
	if err != nil {
		t.Fatal(err)
	}
	for i, f := range index.Files {
		content, _ := os.ReadFile(b.Files[i].Source)
		checkCover(t, content, f)
		if len(f.Chunks) < 3 {
			t.Errorf("%s has %d chunks", f.Path, len(f.Chunks))
		}
	}
}

// checkCover puts the chunks together again.
func checkCover(t interface{ Errorf(string, ...any) }, content []byte, f *dunlinv1.IndexedFile) {
	var again []byte
	for _, c := range f.Chunks {
		part := content[c.Offset : c.Offset+uint64(c.Length)]
		if sum := sha256.Sum256(part); !bytes.Equal(sum[:], c.Sha256) {
			t.Errorf("chunk at %d has SHA-256 %x, its bytes %x", c.Offset, c.Sha256, sum)
		}
		again = append(again, part...)
	}
	if sum := sha256.Sum256(again); !bytes.Equal(again, content) || !bytes.Equal(sum[:], f.Sha256) {
		t.Errorf("the chunks are not the file")
	}
}

// The digest of a version must not depend on when, where, by which version of
// this program or under which name its files are packed. If this test fails,
// a model that is pushed again becomes a new version.
func TestPackIsReproducible(t *testing.T) {
	const golden = "sha256:bb19b34df4f77be0095bb926169b0c148d3537b6757d880f73637fec594dd892"
	first := pack(t, largeModel(t), "a", "b")
	if first.Digest != golden {
		t.Errorf("digest %s, was %s\nmanifest %s\nconfig %s", first.Digest, golden, first.ManifestBytes, first.ConfigBytes)
	}
	path := largeModel(t)
	renamed := filepath.Join(filepath.Dir(path), "other.onnx")
	if err := os.Rename(path, renamed); err != nil {
		t.Fatal(err)
	}
	if again := pack(t, renamed, "a", "b"); again.Digest != first.Digest {
		t.Errorf("digest %s under another name, %s before", again.Digest, first.Digest)
	}
	if other := pack(t, path[:len(path)-len("net.onnx")]+"other.onnx", "a"); other.Digest == first.Digest {
		t.Error("other labels, the same digest")
	}
}

func TestPackRefuses(t *testing.T) {
	ctx := t.Context()
	_, err := Pack(ctx, writeModel(t, nil, nil), PackOptions{})
	checkFault(t, err, "empty file")
	_, err = Pack(ctx, writeModel(t, modelOf(smallGraph()), nil), PackOptions{Labels: []string{"bad\n"}})
	checkFault(t, err, `label "bad\n" holds a control character`)
	taken := modelOf(smallGraph().sub(5, externalTensor("W2", 1, "location", "model.onnx")))
	_, err = Pack(ctx, writeModel(t, taken, map[string]string{"model.onnx": "1234"}), PackOptions{})
	checkFault(t, err, `"model.onnx"`)
	nothing := modelOf(smallGraph().sub(5, externalTensor("W2", 0, "location", "w")))
	_, err = Pack(ctx, writeModel(t, nothing, map[string]string{"w": ""}), PackOptions{})
	checkFault(t, err, "size 0")
	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	if _, err = Pack(cancelled, largeModel(t), PackOptions{}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestChunksCoverAnyContent(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		size := rapid.IntRange(0, 3<<20).Draw(t, "size")
		content := noise(size, rapid.Byte().Draw(t, "seed"))
		if rapid.Bool().Draw(t, "uniform") {
			clear(content)
		}
		f, err := chunk(context.Background(), bytes.NewReader(content))
		if err != nil {
			t.Fatal(err)
		}
		checkCover(t, content, f)
		f.Path = "w"
		if size == 0 {
			if len(f.Chunks) != 0 {
				t.Fatalf("%d chunks of nothing", len(f.Chunks))
			}
			return
		}
		m := &Manifest{Files: []File{{Path: "w", Size: int64(size), Digest: digest.FromBytes(content)}}, Size: int64(size)}
		b, err := proto.Marshal(&dunlinv1.ChunkIndex{Files: []*dunlinv1.IndexedFile{f}})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := parseIndex(b, m); err != nil {
			t.Fatal(err)
		}
	})
}

// What content-defined chunks are for: a change leaves the others alone.
func TestChunksSurviveInsertion(t *testing.T) {
	content := noise(16<<20, 3)
	before, err := chunk(t.Context(), bytes.NewReader(content))
	if err != nil {
		t.Fatal(err)
	}
	changed := append(append(bytes.Clone(content[:5<<20]), "inserted"...), content[5<<20:]...)
	after, err := chunk(t.Context(), bytes.NewReader(changed))
	if err != nil {
		t.Fatal(err)
	}
	known := map[string]bool{}
	for _, c := range before.Chunks {
		known[string(c.Sha256)] = true
	}
	var fetched uint64
	for _, c := range after.Chunks {
		if !known[string(c.Sha256)] {
			fetched += uint64(c.Length)
		}
	}
	if fetched > 2*MaxChunk {
		t.Errorf("8 inserted bytes cost %d", fetched)
	}
	if average := len(content) / len(before.Chunks); average < averageChunk/2 || average > 2*averageChunk {
		t.Errorf("chunks have %d bytes on average", average)
	}
}

func TestParseManifestRefuses(t *testing.T) {
	good := string(pack(t, largeModel(t)).ManifestBytes)
	anyDigest := string(digest.FromString("any"))
	layer := func(path string) string {
		return `{"mediaType":"` + MediaTypeFile + `","digest":"` + anyDigest + `","size":9,"annotations":{"org.opencontainers.image.title":"` + path + `"}},`
	}
	first := `"layers":[`
	before := func(layers string) string { return strings.Replace(good, first, first+layers, 1) }
	replace := func(old, new string) string {
		if !strings.Contains(good, old) {
			t.Fatalf("%q is not in the manifest", old)
		}
		return strings.Replace(good, old, new, 1)
	}
	indexLayer := good[strings.Index(good, `{"mediaType":"`+MediaTypeChunkIndex):strings.Index(good, "]")]
	tests := []struct{ name, manifest, want string }{
		{"good", good, ""},
		{"unknown property", replace(`{"schemaVersion"`, `{"new":1,"schemaVersion"`), ""},
		{"more files", before(layer("a/b") + layer("a/c")), ""},
		{"empty", "", "not valid JSON"},
		{"trailing", good + "{}", "not valid JSON"},
		{"an array", "[]", "not valid JSON"},
		{"large", good + strings.Repeat(" ", MaxManifestBytes), "allowed are 1048576"},
		{"schema", replace(`"schemaVersion":2`, `"schemaVersion":1`), "schemaVersion 1"},
		{"media type", replace("image.manifest.v1+json", "image.index.v1+json"), "mediaType"},
		{"artifact type", replace(`"artifactType":"`+ArtifactType, `"artifactType":"other`), `artifactType "other"`},
		{"config type", replace(MediaTypeConfig, "application/json"), `config has mediaType "application/json"`},
		{"no index", replace(","+indexLayer, ""), "no chunk index"},
		{"two indexes", before(indexLayer + ","), "more than one chunk index"},
		{"no files", good[:strings.Index(good, first)+len(first)] + indexLayer + "]}", "no files"},
		{"strange layer", replace(MediaTypeFile, "text/plain"), `mediaType "text/plain"`},
		{"no title", replace(`{"org.opencontainers.image.title":"model.onnx"}`, "{}"), `path "" has 0 bytes`},
		{"absolute", before(layer("/etc/passwd")), "is absolute"},
		{"parent", before(layer("../x")), `path "../x" leaves its folder`},
		{"parent alone", before(layer("..")), `path ".." leaves its folder`},
		{"parent inside", before(layer("a/../../x")), "not in its shortest form"},
		{"dot", before(layer(".")), "not in its shortest form"},
		{"slash at the end", before(layer("a/")), "not in its shortest form"},
		{"backslash", before(layer(`a\\b`)), "character that is not allowed"},
		{"line break", before(layer(`a\nb`)), "character that is not allowed"},
		{"long path", before(layer(strings.Repeat("p", maxPath+1))), "has 256 bytes, allowed are 1 to 255"},
		{"same path", before(layer("model.onnx")), `two files "model.onnx"`},
		{"file and folder", before(layer("a/b/c") + layer("a/b")), `"a/b" as a file and as a folder`},
		{"negative size", before(strings.Replace(layer("a"), ":9", ":-1", 1)), "size -1"},
		{"no size", before(strings.Replace(layer("a"), ":9", ":0", 1)), "size 0, allowed are 1 to"},
		{"size overflow", before(strings.Replace(layer("a"), ":9", ":9223372036854775807", 1)), "size 9223372036854775807"},
		{"sum too large", before(strings.Replace(layer("a"), ":9", ":68719476736", 1)), "allowed are 1 to 0"},
		{"digest", before(strings.Replace(layer("a"), anyDigest, "sha256:12", 1)), `digest "sha256:12"`},
		{"other hash", before(strings.Replace(layer("a"), anyDigest, "sha512:"+strings.Repeat("a", 128), 1)), "is not sha256: and 64"},
		{"too many files", before(manyLayers(layer, MaxFiles)), "more than 1024 files"},
		{"index too large", replace(`"size":`+numberAfter(indexLayer), `"size":67108865`), "chunk index: size 67108865"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := ParseManifest([]byte(tt.manifest))
			checkFault(t, err, tt.want)
		})
	}
}

// numberAfter gives the size in an encoded descriptor.
func numberAfter(descriptor string) string {
	_, s, _ := strings.Cut(descriptor, `"size":`)
	return s[:strings.IndexAny(s, ",}")]
}

func manyLayers(layer func(string) string, n int) string {
	var all strings.Builder
	for i := range n {
		all.WriteString(layer("f" + string(rune('a'+i%26)) + strings.Repeat("x", i/26)))
	}
	return all.String()
}

func TestIsPlain(t *testing.T) {
	d := string(digest.FromString("model"))
	layer := `{"mediaType":"application/octet-stream","digest":"` + d + `","size":7}`
	manifest := func(rest string) string {
		return `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json",` + rest + `}`
	}
	config := `"config":{"mediaType":"application/vnd.oci.empty.v1+json"}`
	tests := []struct {
		name, manifest string
		want           bool
	}{
		{"artifact", manifest(`"artifactType":"application/onnx",` + config + `,"layers":[` + layer + `]`), true},
		{"image", manifest(config + `,"layers":[` + layer + `]`), true},
		{"without media type", `{"schemaVersion":2,"layers":[` + layer + `]}`, true},
		{"two layers", manifest(config + `,"layers":[` + layer + `,` + layer + `]`), false},
		{"no layer", manifest(config), false},
		{"image index", `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}`, false},
		{"bundle", string(pack(t, writeModel(t, modelOf(smallGraph()), nil)).ManifestBytes), false},
		{"broken bundle", manifest(`"artifactType":"` + ArtifactType + `",` + config + `,"layers":[` + layer + `]`), false},
		{"bad digest", manifest(config + `,"layers":[{"digest":"sha256:1","size":7}]`), false},
		{"no JSON", "x", false},
	}
	for _, tt := range tests {
		got, ok := IsPlain([]byte(tt.manifest))
		if ok != tt.want || ok && (string(got.Digest) != d || got.Size != 7) {
			t.Errorf("%s: %+v, %v", tt.name, got, ok)
		}
	}
}

func TestParseConfigRefuses(t *testing.T) {
	good := string(pack(t, writeModel(t, modelOf(smallGraph()), nil), "label").ConfigBytes)
	tests := []struct{ name, old, new, want string }{
		{"good", "", "", ""},
		{"property that may be ignored", `{"format"`, `{"later":[1],"format"`, ""},
		{"format", `"format":1`, `"format":2`, "config has format 2, this program reads 1"},
		{"no JSON", `{"format"`, `{format`, "not valid JSON"},
		{"trailing", `{"format"`, `{}{"format"`, "not valid JSON"},
		{"entry", `"entry":"model.onnx"`, `"entry":"../model.onnx"`, "entry: path"},
		{"type", `"FP32"`, `"FP33"`, `unknown data type "FP33"`},
		{"no type", `"type":"FP32",`, ``, "no type"},
		{"no outputs", `"outputs":[{"name":"y","type":"FP32","shape":[-1,2]}]`, `"outputs":[]`, "no outputs"},
		{"shape", `[-1,4]`, `[-2,4]`, `input "x" has shape [-2 4] with a dimension below -1`},
		{"name", `"name":"x"`, `"name":""`, "input 0 has no name"},
		{"opset", `"opset":17`, `"opset":-1`, "opset is -1"},
		{"no opset", `"opset":17`, `"opset":0`, "no opset"},
		{"opset of a domain", `"opset":17`, `"opset":17,"opsets":{"a":0}`, `domain "a" is 0`},
		{"IR version", `"irVersion":8`, `"irVersion":0`, "irVersion is 0"},
		{"operators", `["MatMul"]`, `["MatMul","Add"]`, `operator "Add" is not in order`},
		{"weights", `"weightBytes":32`, `"weightBytes":-32`, "not valid JSON"},
		{"label", `"label"`, `"\u0007"`, "holds a control character"},
		{"costs", `{"format"`, `{"costs":{"flops":{"fixed":1,"perRow":2},"nodes":3,"unknown":["a","b"]},"format"`, ""},
		{"negative cost", `{"format"`, `{"costs":{"flops":{"perRow":-1}},"format"`, "costs: flops has -1, allowed are 0 to 1e+18"},
		{"large cost", `{"format"`, `{"costs":{"workspace":{"fixed":1e300}},"format"`, "costs: workspace has 1e+300"},
		{"nodes", `{"format"`, `{"costs":{"nodes":-1},"format"`, "costs: -1 nodes"},
		{"unknown operators", `{"format"`, `{"costs":{"unknown":["b","a"]},"format"`, `unknown operator "a" is not in order`},
		{"large", `{"format"`, strings.Repeat(" ", MaxConfigBytes) + `{"format"`, "allowed are 4194304"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if !strings.Contains(good, tt.old) {
				t.Fatalf("%q is not in %s", tt.old, good)
			}
			_, err := ParseConfig([]byte(strings.Replace(good, tt.old, tt.new, 1)))
			checkFault(t, err, tt.want)
		})
	}
}

func TestConfigKeepsUnknownRank(t *testing.T) {
	graph := message{}.sub(11, message{}.str(1, "x").sub(2, message{}.sub(1, message{}.num(1, 1)))).
		sub(11, valueInfo("scalar", tensor.Int8)).sub(12, outputY)
	c, err := ParseConfig(pack(t, writeModel(t, modelOf(graph), nil)).ConfigBytes)
	if err != nil {
		t.Fatal(err)
	}
	if c.Inputs[0].Shape != nil || c.Inputs[1].Shape == nil {
		t.Errorf("inputs %#v", c.Inputs)
	}
}

func TestParseIndexRefuses(t *testing.T) {
	b := pack(t, largeModel(t))
	m, err := ParseManifest(b.ManifestBytes)
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name   string
		change func(x *dunlinv1.ChunkIndex)
		want   string
	}{
		{"good", func(*dunlinv1.ChunkIndex) {}, ""},
		{"file missing", func(x *dunlinv1.ChunkIndex) { x.Files = x.Files[:1] }, "has 1 files, the manifest has 2"},
		{"order", func(x *dunlinv1.ChunkIndex) { x.Files[0], x.Files[1] = x.Files[1], x.Files[0] }, "in its place"},
		{"size", func(x *dunlinv1.ChunkIndex) { x.Files[0].SizeBytes++ }, "in the manifest"},
		{"digest", func(x *dunlinv1.ChunkIndex) { x.Files[0].Sha256[0]++ }, "SHA-256"},
		{"digest length", func(x *dunlinv1.ChunkIndex) { x.Files[0].Sha256 = make([]byte, 99) }, "SHA-256"},
		{"gap", func(x *dunlinv1.ChunkIndex) { x.Files[0].Chunks[1].Offset++ }, "chunk 1 starts at byte"},
		{"overlap", func(x *dunlinv1.ChunkIndex) { x.Files[0].Chunks[0].Length++ }, "chunk 1 starts at byte"},
		{"last missing", func(x *dunlinv1.ChunkIndex) { c := &x.Files[0].Chunks; *c = (*c)[:len(*c)-1] }, "its chunks cover"},
		{"no chunks", func(x *dunlinv1.ChunkIndex) { x.Files[0].Chunks = nil }, "its chunks cover 0 of"},
		{"empty chunk", func(x *dunlinv1.ChunkIndex) { x.Files[0].Chunks[0].Length = 0 }, "chunk 0 has 0 bytes, allowed are 65536 to 1048576"},
		{"long chunk", func(x *dunlinv1.ChunkIndex) { x.Files[0].Chunks[0].Length = MaxChunk + 1 }, "chunk 0 has 1048577 bytes"},
		{"hash of a chunk", func(x *dunlinv1.ChunkIndex) { x.Files[0].Chunks[0].Sha256 = nil }, "a SHA-256 of 0 bytes"},
		{"many chunks", func(x *dunlinv1.ChunkIndex) { x.Files[0].Chunks = make([]*dunlinv1.Chunk, 1000) }, "files and chunks, for 2 files of"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			x := &dunlinv1.ChunkIndex{}
			if err := proto.Unmarshal(b.IndexBytes, x); err != nil {
				t.Fatal(err)
			}
			tt.change(x)
			for _, f := range x.Files {
				for i, c := range f.Chunks {
					if c == nil {
						f.Chunks[i] = &dunlinv1.Chunk{}
					}
				}
			}
			changed, err := proto.Marshal(x)
			if err != nil {
				t.Fatal(err)
			}
			_, err = parseIndex(changed, m)
			checkFault(t, err, tt.want)
		})
	}
	_, err = ParseIndex(b.IndexBytes[1:], m)
	checkFault(t, err, "the manifest names "+m.Index.Digest.String())
	_, err = parseIndex([]byte{0xff}, m)
	checkFault(t, err, "chunk index: ")
	one := &Manifest{Files: []File{{Path: "w", Size: 1, Digest: digest.FromString("a")}}, Size: 1}
	f, err := chunk(t.Context(), strings.NewReader("a"))
	if err != nil {
		t.Fatal(err)
	}
	f.Path, f.Chunks[0].Sha256 = "w", make([]byte, 32)
	wrong, err := proto.Marshal(&dunlinv1.ChunkIndex{Files: []*dunlinv1.IndexedFile{f}})
	if err != nil {
		t.Fatal(err)
	}
	_, err = parseIndex(wrong, one)
	checkFault(t, err, "another SHA-256 than the file")
}

func TestCheckName(t *testing.T) {
	for _, name := range []string{"digits", "a", "0", "a.b-c_d", strings.Repeat("a", 63)} {
		if err := CheckName(name); err != nil {
			t.Error(err)
		}
	}
	for _, name := range []string{"", "A", "a--b", "-a", "a.", "a/b", "a:b", "ä", "a b", "a\n", strings.Repeat("a", 64)} {
		if err := CheckName(name); !errors.Is(err, ErrInvalid) {
			t.Errorf("%q: %v", name, err)
		}
	}
}

func TestParseRef(t *testing.T) {
	tests := []struct {
		ref, name string
		version   int64
	}{
		{"digits", "digits", 0}, {"digits:3", "digits", 3}, {"d:9007199254740991", "d", MaxVersion},
	}
	for _, tt := range tests {
		if name, v, err := ParseRef(tt.ref); name != tt.name || v != tt.version || err != nil {
			t.Errorf("%q: %q, %d, %v", tt.ref, name, v, err)
		}
	}
	for _, ref := range []string{"", ":1", "digits:", "digits:0", "digits:-1", "digits:+1", "digits:01", "digits:1.0", "digits:1:2", "digits:9007199254740992", "Digits:1"} {
		if _, _, err := ParseRef(ref); !errors.Is(err, ErrInvalid) {
			t.Errorf("%q: %v", ref, err)
		}
	}
}

// Models that another program wrote.
func TestPackExamples(t *testing.T) {
	paths, err := filepath.Glob("examples/*/*.onnx")
	if err != nil || len(paths) == 0 {
		t.Fatalf("no examples: %v", err)
	}
	for _, path := range paths {
		b := pack(t, path)
		if len(b.Config.Inputs) == 0 || b.Config.Opset == 0 || len(b.Config.Operators) == 0 || b.Config.WeightBytes == 0 {
			t.Errorf("%s: %+v", path, b.Config)
		}
	}
}
