package main

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dunlin/dunlin/internal/pki"
	"github.com/dunlin/dunlin/models"
	"github.com/dunlin/dunlin/models/signing"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
	"github.com/dunlin/dunlin/proto/dunlin/v1/dunlinv1connect"
)

// maxTrustFile bounds a file with a trust document: its bytes in base64, and
// its signatures.
const maxTrustFile = 4 * signing.MaxTrustBytes

// defaultExpiry is how long an edited document counts.
const defaultExpiry = "1y"

func (c *client) trust() dunlinv1connect.TrustServiceClient {
	return dunlinv1connect.NewTrustServiceClient(c.http, c.URL, c.opts...)
}

func (c *cli) trustCommand() *cobra.Command {
	return group("trust", "Say whose signatures count on devices",
		c.trustShowCommand(), c.trustInitCommand(), c.trustEditCommand(), c.trustSignCommand(), c.trustApplyCommand())
}

func (c *cli) trustShowCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "show [FILE]",
		Short:   "Show the trust document in force, or that in a file",
		Example: "  dunlin trust show\n  dunlin trust show next.json",
		Args:    arguments(0, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var signed *dunlinv1.SignedTrust
			var err error
			if len(args) == 1 {
				signed, err = readTrust(args[0])
			} else {
				signed, err = c.newestTrust(cmd.Context())
			}
			if err != nil {
				return err
			}
			return describeTrust(c.out, signed)
		},
	}
}

func describeTrust(w io.Writer, signed *dunlinv1.SignedTrust) error {
	d, err := signing.ParseTrustDocument(signed)
	if err != nil {
		return fmt.Errorf("trust document: %w", err)
	}
	_, err = io.WriteString(w, signing.Describe(d))
	for _, s := range signed.GetSignatures() {
		if err == nil {
			_, err = fmt.Fprintf(w, "signed by %s\n", s.GetKeyId())
		}
	}
	return err
}

// newestTrust asks for the trust document in force, and believes it only where
// the documents before it lead there.
func (c *cli) newestTrust(ctx context.Context) (*dunlinv1.SignedTrust, error) {
	ctl, err := c.client()
	if err != nil {
		return nil, err
	}
	res, err := call(ctx, ctl.trust().GetTrust, &dunlinv1.GetTrustRequest{})
	if err != nil {
		return nil, fmt.Errorf("get trust document: %w", err)
	}
	t, err := signing.Advance(nil, res.GetTrust())
	if err == nil && t == nil {
		err = errors.New("the controller has none")
	}
	if err != nil {
		return nil, fmt.Errorf("get trust document: %w", err)
	}
	return t.Signed(), nil
}

func readTrust(path string) (*dunlinv1.SignedTrust, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read trust document: %w", err)
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, maxTrustFile+1))
	signed := new(dunlinv1.SignedTrust)
	switch {
	case err != nil:
	case len(raw) > maxTrustFile:
		err = fmt.Errorf("has more than %d bytes", maxTrustFile)
	default:
		err = protojson.Unmarshal(raw, signed)
	}
	if err != nil {
		return nil, fmt.Errorf("read trust document: %s: %w", path, err)
	}
	return signed, nil
}

func encodeTrust(signed *dunlinv1.SignedTrust) ([]byte, error) {
	raw, err := protojson.Marshal(signed)
	return append(raw, '\n'), err
}

func (c *cli) trustInitCommand() *cobra.Command {
	var expires string
	cmd := &cobra.Command{
		Use:   "init KEY",
		Short: "Make the next trust document, with KEY as its only root",
		Long: `init writes the next trust document to standard output, unsigned: the one in
force, but for its root keys, of which KEY, a public key in PEM, is the only
one. It is how a site takes the root key away from its controller. Sign it by
the controller's root key (trust-root.pem in the folder keys of its data), and
by the new one; then apply it, and delete the controller's.`,
		Example: "  dunlin trust init root.pem.pub > next.json",
		Args:    arguments(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.nextTrust(cmd.Context(), expires, func(d *dunlinv1.TrustDocument) error {
				d.RootKeys = nil
				return addKeys(&d.RootKeys, args)
			})
		},
	}
	cmd.Flags().StringVar(&expires, "expires", defaultExpiry, "how long the document counts, as 1y, 90d or 12h")
	return cmd
}

// nextTrust writes the document after the one in force, changed.
func (c *cli) nextTrust(ctx context.Context, expires string, change func(*dunlinv1.TrustDocument) error) error {
	lasts, err := parseLasting(expires)
	if err != nil {
		return usagef("--expires: %v", err)
	}
	signed, err := c.newestTrust(ctx)
	if err != nil {
		return err
	}
	d, err := signing.ParseTrustDocument(signed)
	if err != nil {
		return err
	}
	now := time.Now()
	d.Version++
	d.IssuedAt, d.ExpiresAt = timestamppb.New(now), timestamppb.New(now.Add(lasts))
	if err := change(d); err != nil {
		return err
	}
	next, err := signing.NewTrust(d)
	if err != nil {
		return fmt.Errorf("trust document %d: %w", d.Version, err)
	}
	raw, err := encodeTrust(next)
	if err != nil {
		return err
	}
	_, err = c.out.Write(raw)
	return errors.Join(err, describeTrust(c.err, next))
}

// parseLasting reads "1y", "90d" or what time.ParseDuration reads.
func parseLasting(s string) (time.Duration, error) {
	const day = 24 * time.Hour
	lasts, err := time.ParseDuration(s)
	for suffix, unit := range map[string]time.Duration{"d": day, "y": 365 * day} {
		if number, ok := strings.CutSuffix(s, suffix); ok {
			var n int
			n, err = strconv.Atoi(number)
			lasts = time.Duration(min(max(n, 0), 100*365)) * unit
		}
	}
	if err != nil || lasts <= 0 || lasts > 50*365*day {
		return 0, fmt.Errorf("%q is not a time up to 50y, as 1y, 90d or 12h", s)
	}
	return lasts, nil
}

// trustEdits are the flags of trust edit.
type trustEdits struct {
	expires             string
	add, remove         map[string]*[]string // by list
	notBefore, notAfter []string
	requirePublisher    bool
	modelFloors         []string
	agentFloor          string
}

// trustLists are the lists of keys in a document.
var trustLists = []struct {
	flag, what string
	of         func(*dunlinv1.TrustDocument) *[]*dunlinv1.TrustKey
}{
	{"root", "signs the next document", func(d *dunlinv1.TrustDocument) *[]*dunlinv1.TrustKey { return &d.RootKeys }},
	{"publisher", "signs bundles as a publisher", func(d *dunlinv1.TrustDocument) *[]*dunlinv1.TrustKey { return &d.PublisherKeys }},
	{"controller-key", "signs bundles as a controller", func(d *dunlinv1.TrustDocument) *[]*dunlinv1.TrustKey { return &d.ControllerKeys }},
	{"agent-key", "signs agent binaries", func(d *dunlinv1.TrustDocument) *[]*dunlinv1.TrustKey { return &d.AgentKeys }},
}

func (c *cli) trustEditCommand() *cobra.Command {
	e := trustEdits{add: map[string]*[]string{}, remove: map[string]*[]string{}}
	cmd := &cobra.Command{
		Use:   "edit",
		Short: "Make the next trust document",
		Long: `edit writes the document after the one in force to standard output, changed and
unsigned, and what it says to standard error. KEY is a file in PEM: a public
key, or the certificate of an authority, whose certificates for code signing
count. ID is the id of a key, or the first 8 digits of it or more.`,
		Example: "  dunlin trust edit --add-publisher vision.pem.pub --require-publisher > next.json\n  dunlin trust edit --model-floor digits:3 --agent-floor 0.7.0 --expires 2y > next.json",
		Args:    arguments(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.nextTrust(cmd.Context(), e.expires, func(d *dunlinv1.TrustDocument) error {
				return e.apply(d, cmd.Flags().Changed)
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&e.expires, "expires", defaultExpiry, "how long the document counts, as 1y, 90d or 12h")
	for _, l := range trustLists {
		e.add[l.flag], e.remove[l.flag] = new([]string), new([]string)
		f.StringArrayVar(e.add[l.flag], "add-"+l.flag, nil, "file with a `KEY` that "+l.what)
		f.StringArrayVar(e.remove[l.flag], "remove-"+l.flag, nil, "`ID` of a key that no longer "+l.what)
	}
	f.StringArrayVar(&e.notBefore, "not-before", nil, "`ID=DATE` from which on a key counts, as 2027-01-31")
	f.StringArrayVar(&e.notAfter, "not-after", nil, "`ID=DATE` until which a key counts, as 2027-01-31")
	f.BoolVar(&e.requirePublisher, "require-publisher", false, "whether bundles need a publisher's signature")
	f.StringArrayVar(&e.modelFloors, "model-floor", nil, "`NAME:VERSION` below which devices take no version of the model")
	f.StringVar(&e.agentFloor, "agent-floor", "", "`VERSION` below which devices take no agent binary, as 0.7.0")
	return cmd
}

// apply changes a document as the flags say that are set.
func (e *trustEdits) apply(d *dunlinv1.TrustDocument, set func(flag string) bool) error {
	for _, l := range trustLists {
		if err := addKeys(l.of(d), *e.add[l.flag]); err != nil {
			return err
		}
		for _, id := range *e.remove[l.flag] {
			keys := l.of(d)
			i, err := findKey(*keys, id)
			if err != nil {
				return usagef("--remove-%s: %v", l.flag, err)
			}
			*keys = slices.Delete(*keys, i, i+1)
		}
	}
	for _, bound := range []struct {
		flag string
		of   []string
		set  func(*dunlinv1.TrustKey, *timestamppb.Timestamp)
	}{
		{"not-before", e.notBefore, func(k *dunlinv1.TrustKey, at *timestamppb.Timestamp) { k.NotBefore = at }},
		{"not-after", e.notAfter, func(k *dunlinv1.TrustKey, at *timestamppb.Timestamp) { k.NotAfter = at }},
	} {
		for _, text := range bound.of {
			id, date, _ := strings.Cut(text, "=")
			at, err := time.Parse(time.DateOnly, date)
			if err != nil {
				return usagef("--%s: %q is not ID=DATE, with a date as 2027-01-31", bound.flag, text)
			}
			found := false
			for _, l := range trustLists {
				if i, err := findKey(*l.of(d), id); err == nil {
					bound.set((*l.of(d))[i], timestamppb.New(at))
					found = true
				}
			}
			if !found {
				return usagef("--%s: there is no key %s, or more than one", bound.flag, id)
			}
		}
	}
	if set("require-publisher") {
		d.RequirePublisher = e.requirePublisher
	}
	if set("agent-floor") {
		d.AgentFloor = e.agentFloor
	}
	for _, text := range e.modelFloors {
		name, version, err := models.ParseRef(text)
		if err != nil || version == 0 {
			return usagef("--model-floor: %q is not NAME:VERSION", text)
		}
		d.ModelFloors = slices.DeleteFunc(d.ModelFloors, func(f *dunlinv1.ModelFloor) bool { return f.GetModel() == name })
		d.ModelFloors = append(d.ModelFloors, &dunlinv1.ModelFloor{Model: name, Version: version})
	}
	return nil
}

// minID is the least number of digits by which a key may be named.
const minID = 8

func findKey(keys []*dunlinv1.TrustKey, id string) (int, error) {
	found := -1
	for i, k := range keys {
		if len(id) >= minID && strings.HasPrefix(k.GetKeyId(), id) {
			if found >= 0 {
				return 0, fmt.Errorf("more than one key begins with %s", id)
			}
			found = i
		}
	}
	if found < 0 {
		return 0, fmt.Errorf("there is no key %s", id)
	}
	return found, nil
}

// addKeys adds the public keys and authorities in PEM files, which are known
// by the files' names.
func addKeys(to *[]*dunlinv1.TrustKey, files []string) error {
	for _, file := range files {
		raw, err := os.ReadFile(file)
		if err != nil {
			return fmt.Errorf("read key: %w", err)
		}
		public, err := signing.DecodePublicKey(raw)
		var authority *x509.Certificate
		if err != nil {
			certs, certErr := pki.DecodeCertificates(raw)
			if certErr != nil {
				return fmt.Errorf("read key: %s holds neither a public key nor a certificate: %w", file, err)
			}
			authority = certs[0]
		}
		comment := strings.TrimSuffix(strings.TrimSuffix(filepath.Base(file), ".pub"), ".pem")
		k, err := signing.NewTrustKey(public, authority, comment)
		if err != nil {
			return fmt.Errorf("read key: %s: %w", file, err)
		}
		if _, err := findKey(*to, k.GetKeyId()); err == nil {
			return fmt.Errorf("key %s (%s) is there already", k.GetKeyId(), file)
		}
		*to = append(*to, k)
	}
	return nil
}

func (c *cli) trustSignCommand() *cobra.Command {
	var keyFiles []string
	cmd := &cobra.Command{
		Use:   "sign FILE",
		Short: "Sign a trust document by a root key",
		Long: `sign adds the signatures of root keys to the trust document in FILE, and says on
standard error what they sign. It needs no controller: the key may be where no
network is. A document must be signed by a root key of the one before and by
one of its own; one key can be both.`,
		Example: "  dunlin trust sign next.json --key root.pem",
		Args:    arguments(1, 1),
		RunE: func(_ *cobra.Command, args []string) error {
			if len(keyFiles) == 0 {
				return usagef("--key must say who signs")
			}
			signed, err := readTrust(args[0])
			if err != nil {
				return err
			}
			for _, file := range keyFiles {
				key, err := pki.ReadKey(file)
				if err != nil {
					return err
				}
				if err := signing.SignTrust(signed, key); err != nil {
					return err
				}
			}
			if err := describeTrust(c.err, signed); err != nil {
				return err
			}
			raw, err := encodeTrust(signed)
			if err != nil {
				return err
			}
			return pki.WriteFile(args[0], raw, 0o644)
		},
	}
	cmd.Flags().StringArrayVar(&keyFiles, "key", nil, "file with a root `KEY`, PKCS #8 in PEM")
	return cmd
}

func (c *cli) trustApplyCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "apply FILE",
		Short:   "Make a signed trust document the one in force",
		Example: "  dunlin trust apply next.json",
		Args:    arguments(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			signed, err := readTrust(args[0])
			if err != nil {
				return err
			}
			ctl, err := c.client()
			if err != nil {
				return err
			}
			if err := c.confirm(cmd.Context(), hostName(ctl.URL), "this changes what all devices of %s trust", hostName(ctl.URL)); err != nil {
				return err
			}
			if _, err := call(cmd.Context(), ctl.trust().PutTrust, &dunlinv1.PutTrustRequest{Trust: signed}); err != nil {
				return fmt.Errorf("apply %s: %w", args[0], err)
			}
			return describeTrust(c.err, signed)
		},
	}
}

// sumOf gives the SHA-256 of a file.
func sumOf(path string) (sum [sha256.Size]byte, err error) {
	f, err := os.Open(path)
	if err != nil {
		return sum, err
	}
	defer f.Close()
	h := sha256.New()
	_, err = io.Copy(h, f)
	return [sha256.Size]byte(h.Sum(nil)), err
}
