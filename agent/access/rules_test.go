package access

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"
	"testing"
	"time"
)

const (
	goodKey    = "a-key-of-the-tests-0001"
	anotherKey = "another-key-of-the-tests"
)

func sumOf(key string) string {
	sum := sha256.Sum256([]byte(key))
	return sumPrefix + hex.EncodeToString(sum[:])
}

func TestParseRules(t *testing.T) {
	rs, err := parseRules("keys", []byte("# of the shop\n\n  "+goodKey+"  \n"+
		sumOf(anotherKey)+" name=camera-1 models=digits,vision* rate=90/m burst=100 expires=2027-01-31\n"+
		"cert=camera-* rate=50/s expires=2027-01-31T12:00:00Z\n"))
	if err != nil {
		t.Fatal(err)
	}
	plain, camera, cert := rs[0], rs[1], rs[2]
	if rs.key(sha256.Sum256([]byte(goodKey))) != plain || rs.key(sha256.Sum256([]byte(anotherKey))) != camera || rs.key(sha256.Sum256(nil)) != nil {
		t.Error("keys are not found")
	}
	if rs.certificateOf("camera-7") != cert || rs.certificateOf("door") != nil || rs.certificateOf("") != nil {
		t.Error("certificates are not found")
	}
	sum := sha256.Sum256([]byte(goodKey))
	if plain.Name != "key-"+hex.EncodeToString(sum[:4]) || plain.Rate.Count != 0 || !plain.Expires.IsZero() || !plain.allows("anything") || !plain.allows("") {
		t.Errorf("a key alone: %+v", plain)
	}
	if camera.Name != "camera-1" || camera.Rate.limit() != 1.5 || camera.Burst != 100 || !camera.Expires.Equal(time.Date(2027, 2, 1, 0, 0, 0, 0, time.UTC)) {
		t.Errorf("a key with options: %+v", camera)
	}
	for model, want := range map[string]bool{"digits": true, "vision": true, "vision-2": true, "digit": false, "digits2": false, "": false} {
		if camera.allows(model) != want {
			t.Errorf("%q: %t", model, !want)
		}
	}
	if cert.Name != "" || cert.Burst != 50 || !cert.Expires.Equal(time.Date(2027, 1, 31, 12, 0, 0, 0, time.UTC)) {
		t.Errorf("a certificate: %+v", cert)
	}
}

func TestRuleFaults(t *testing.T) {
	var many strings.Builder
	for n := range maxRules + 1 {
		fmt.Fprintf(&many, "key-number-%06d\n", n)
	}
	for content, want := range map[string]string{
		"":                              "keys holds no key",
		"# only words\n":                "keys holds no key",
		goodKey + "\nshort\n":           "keys:2: the key has 5 characters, at least 16",
		many.String():                   "keys:1025: more than 1024 keys",
		"sha256:12":                     "keys:1: sha256: has to be followed by the 64 hexadecimal digits",
		"cert=":                         "keys:1: cert= is not the common name",
		"cert=[":                        "keys:1: cert=[ is not the common name",
		goodKey + " and more":           "keys:1: word 2 is not option=value",
		goodKey + " name=" + "a b":      "keys:1: word 3 is not option=value",
		goodKey + " name=!":             `keys:1: name "!" is not 1 to 63 letters`,
		goodKey + " color=red":          `keys:1: unknown option "color": there are name, models, rate, burst, expires`,
		goodKey + " models=a,,b":        `keys:1: models: "" is not the name of a model`,
		goodKey + " models=[":           `keys:1: models: "[" is not the name of a model`,
		goodKey + " rate=0/s":           `keys:1: rate "0/s" is not N/s, N/m or N/h with N from 1 to 1000000`,
		goodKey + " rate=5":             `keys:1: rate "5" is not`,
		goodKey + " rate=5/d":           `keys:1: rate "5/d" is not`,
		goodKey + " burst=5":            "keys:1: burst has a meaning with rate only",
		goodKey + " rate=5/s burst=0":   `keys:1: burst is "0", allowed are 1 to 1000000`,
		goodKey + " expires=soon":       `keys:1: expires "soon" is not a day as 2027-01-31`,
		goodKey + " rate=5/s rate=6/s":  "keys:1: rate is given twice",
		goodKey + "\n" + sumOf(goodKey): "keys:2: the key is that of line 1",
		"cert=a\n\ncert=a":              "keys:3: certificate a has line 1",
		goodKey + " name=a rate=5/s\n" + anotherKey + " name=a": "keys:2: name a has another rate or burst on line 1",
		"short\n" + goodKey + " color=red":                      "keys:1: the key has 5 characters, at least 16 are needed\nkeys:2: unknown option",
	} {
		if _, err := parseRules("keys", []byte(content)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.60q: %v, want %q", content, err, want)
		}
	}
	// What may be a part of a key is not shown.
	for _, content := range []string{goodKey[:9], goodKey + " " + anotherKey} {
		if _, err := parseRules("keys", []byte(content)); err == nil || strings.Contains(err.Error(), goodKey[:9]) || strings.Contains(err.Error(), anotherKey) {
			t.Errorf("%v", err)
		}
	}
}

func FuzzRules(f *testing.F) {
	f.Add([]byte(goodKey + " name=camera-1 models=digits,vision* rate=50/s burst=100 expires=2027-01-31\ncert=camera-*\n" + sumOf(anotherKey)))
	f.Fuzz(func(t *testing.T, text []byte) {
		rs, err := parseRules("keys", text)
		if err != nil {
			return
		}
		if len(rs) == 0 || len(rs) > maxRules {
			t.Fatalf("%d rules", len(rs))
		}
		for _, r := range rs {
			r.allows("model")
			rs.certificateOf("name")
			if r.certificate == "" && rs.key(r.sum) != r {
				t.Fatalf("line %d is not found by its key", r.line)
			}
			if (r.Rate.Count > 0) != (r.Burst > 0) || r.Rate.Count > 0 && r.Rate.limit() <= 0 {
				t.Fatalf("rate %v, burst %d", r.Rate, r.Burst)
			}
		}
	})
}
