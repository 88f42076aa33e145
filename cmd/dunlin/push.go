package main

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"

	"github.com/dunlin/dunlin/models"
	"github.com/dunlin/dunlin/models/serving"
	"github.com/dunlin/dunlin/models/signing"
	"github.com/dunlin/dunlin/models/triton"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
	"github.com/dunlin/dunlin/proto/inference"
)

// registerTimeout bounds the call by which the controller reads a pushed
// bundle whole and makes it a version.
const registerTimeout = 30 * time.Minute

// maxLabelsFile bounds the file of class labels.
const maxLabelsFile = 4 << 20

func (c *cli) pushCommand() *cobra.Command {
	var f pushFlags
	cmd := &cobra.Command{
		Use:   "push FILE NAME[:VERSION]",
		Short: "Push an ONNX model and make it a version",
		Long: `push packs the ONNX file and its external data into a bundle, uploads what the
registry lacks, and makes it a version of the model: VERSION, or the next one.
Versions are immutable; the same bytes again change nothing.

With --reference, the version has inputs and the outputs that they have, in the
form of an inference request and its answer, with what they may differ by:

  {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [0.5, 1]}],
   "outputs": [...], "tolerance": {"relative": 0.001, "absolute": 0.00001}}

With --sign, the version is signed in the form of OpenSSF Model Signing, and the
signature is pushed beside it.

It prints "NAME:VERSION DIGEST".`,
		Example: "  dunlin push digits.onnx digits\n  dunlin push resnet50.onnx resnet50:3 --labels imagenet.txt --config config.pbtxt",
		Args:    arguments(2, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.push(cmd.Context(), args[0], args[1], f)
		},
	}
	cmd.Flags().StringVar(&f.labels, "labels", "", "file with the names of the model's classes, one a line")
	cmd.Flags().StringVar(&f.config, "config", "", "Triton model configuration (config.pbtxt) that says how requests are scheduled")
	cmd.Flags().StringVar(&f.reference, "reference", "", "JSON file with inputs and the outputs that they have, by which devices see that they compute the same")
	cmd.Flags().StringVar(&f.key, "sign", "", "file with the `KEY` that signs the version, PKCS #8 in PEM, see dunlin keys create")
	cmd.Flags().StringVar(&f.cert, "cert", "", "file with the key's certificate and those up to the authority, in PEM")
	return cmd
}

type pushFlags struct{ labels, config, reference, key, cert string }

// blob is one piece of a bundle to be uploaded: a local file, or bytes.
type blob struct {
	name   string
	digest digest.Digest
	size   int64
	open   func() (io.ReaderAt, io.Closer, error)
}

func (c *cli) push(ctx context.Context, file, ref string, f pushFlags) error {
	name, version, err := models.ParseRef(ref)
	if err != nil {
		return usagef("%v", err)
	}
	var by signing.Signer
	if f.key != "" {
		if by, err = readSigner(f.key, f.cert); err != nil {
			return err
		}
	} else if f.cert != "" {
		return usagef("--cert is of no use without --sign")
	}
	labels, err := readLabels(f.labels)
	if err != nil {
		return err
	}
	config, options, err := c.readConfig(f.config)
	if err != nil {
		return err
	}
	ctl, err := c.client()
	if err != nil {
		return err
	}
	up, err := uploaderOf(ctx, ctl, name)
	if err != nil {
		return fmt.Errorf("push %s: %w", ref, err)
	}
	bundle, err := models.Pack(ctx, file, models.PackOptions{Labels: labels, Serving: options, Reference: f.reference})
	if err != nil {
		return fmt.Errorf("pack %s: %w", file, err)
	}
	if config != nil {
		if err := triton.CheckModel(config, bundle.Config.Inputs, bundle.Config.Outputs); err != nil {
			return fmt.Errorf("config %s does not fit %s: %w", f.config, file, err)
		}
	}
	if err := c.upload(ctx, up, bundle); err != nil {
		return fmt.Errorf("push %s: %w", ref, err)
	}
	if by.Key != nil {
		if version, err = c.signVersion(ctx, ctl, up, by, name, version, bundle); err != nil {
			return fmt.Errorf("sign %s: %w", ref, err)
		}
	}
	return c.register(ctx, ctl, name, version, bundle)
}

// uploaderOf gives what pushes to the controller's registry as a model.
func uploaderOf(ctx context.Context, ctl *client, name string) (*uploader, error) {
	who, err := call(ctx, ctl.auth().WhoAmI, &dunlinv1.WhoAmIRequest{})
	if err != nil {
		return nil, err
	}
	registryURL, err := checkURL(who.GetRegistryUrl())
	if err != nil {
		return nil, fmt.Errorf("the controller's registry: %w", err)
	}
	return &uploader{http: ctl.http, base: registryURL + "/v2/" + name, authorization: bearer(ctl.Token).header()}, nil
}

// register makes a bundle that was uploaded a version, the next one where
// version is 0, and prints which.
func (c *cli) register(ctx context.Context, ctl *client, name string, version int64, bundle *models.Bundle) error {
	registerCtx, cancel := context.WithTimeout(ctx, registerTimeout)
	defer cancel()
	res, err := callLong(registerCtx, ctl.models().CreateVersion, &dunlinv1.CreateVersionRequest{Model: name, Digest: bundle.Digest.String(), Version: version})
	if err != nil {
		return fmt.Errorf("push %s: %w", name, err)
	}
	v := res.GetVersion()
	if !res.GetCreated() {
		fmt.Fprintf(c.err, "These bytes are already version %d of %s.\n", v.GetVersion(), v.GetModel())
	}
	fmt.Fprintf(c.out, "%s:%d %s\n", v.GetModel(), v.GetVersion(), v.GetDigest())
	return nil
}

// signVersion signs a bundle as the version that it has, is to have, or, where
// that is 0, will have, and pushes the signature.
func (c *cli) signVersion(ctx context.Context, ctl *client, up *uploader, by signing.Signer, name string, version int64, bundle *models.Bundle) (int64, error) {
	res, err := call(ctx, ctl.models().ListModels, &dunlinv1.ListModelsRequest{Model: name})
	if err != nil {
		return 0, err
	}
	next := int64(1)
	for _, v := range res.GetVersions() {
		next = max(next, v.GetVersion()+1)
	}
	version = cmp.Or(version, next)
	for _, v := range res.GetVersions() {
		if v.GetDigest() == bundle.Digest.String() {
			version = v.GetVersion()
		}
	}
	m, err := models.ParseManifest(bundle.ManifestBytes)
	if err != nil {
		return 0, err
	}
	signature, err := signing.SignBundle(by, name, version, m)
	if err != nil {
		return 0, err
	}
	manifest, err := signing.NewManifest(bundle.Digest, int64(len(bundle.ManifestBytes)), signature)
	if err != nil {
		return 0, err
	}
	p := newProgress(io.Discard, false, "sign")
	for _, b := range []blob{bytesBlob("empty config", ocispec.DescriptorEmptyJSON.Data), bytesBlob("signature", signature)} {
		if err := up.put(ctx, b, p); err != nil {
			return 0, fmt.Errorf("upload %s: %w", b.name, err)
		}
	}
	if err := up.putManifest(ctx, digest.FromBytes(manifest), manifest); err != nil {
		return 0, fmt.Errorf("upload the signature's manifest: %w", err)
	}
	return version, nil
}

// upload sends the blobs that the registry lacks, then the manifest.
func (c *cli) upload(ctx context.Context, up *uploader, bundle *models.Bundle) error {
	blobs := []blob{
		bytesBlob("config", bundle.ConfigBytes),
		bytesBlob("chunk index", bundle.IndexBytes),
	}
	for _, f := range bundle.Files {
		blobs = append(blobs, blob{f.Path, f.Digest, f.Size, func() (io.ReaderAt, io.Closer, error) {
			file, err := os.Open(f.Source)
			return file, file, err
		}})
	}
	p := newProgress(c.err, isTerminal(c.err), "push")
	for _, b := range blobs {
		p.total += b.size
	}
	stop := p.run()
	defer stop()
	for _, b := range blobs {
		if err := up.put(ctx, b, p); err != nil {
			return fmt.Errorf("upload %s: %w", b.name, err)
		}
	}
	if err := up.putManifest(ctx, bundle.Digest, bundle.ManifestBytes); err != nil {
		return fmt.Errorf("upload manifest: %w", err)
	}
	p.finish()
	return nil
}

func bytesBlob(name string, b []byte) blob {
	return blob{name, digest.FromBytes(b), int64(len(b)), func() (io.ReaderAt, io.Closer, error) {
		return strings.NewReader(string(b)), io.NopCloser(nil), nil
	}}
}

func readLabels(path string) ([]string, error) {
	if path == "" {
		return nil, nil
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read labels: %w", err)
	}
	defer f.Close()
	var labels []string
	s := bufio.NewScanner(io.LimitReader(f, maxLabelsFile+1))
	n := 0
	for s.Scan() {
		n += len(s.Bytes()) + 1
		if l := strings.TrimSpace(s.Text()); l != "" {
			labels = append(labels, l)
		}
	}
	switch {
	case s.Err() != nil:
		return nil, fmt.Errorf("read labels: %s: %w", path, s.Err())
	case n > maxLabelsFile:
		return nil, fmt.Errorf("read labels: %s has more than %d bytes", path, maxLabelsFile)
	case len(labels) == 0:
		return nil, errors.New("read labels: " + path + " has none")
	}
	return labels, nil
}

// readConfig reads a config.pbtxt and the scheduling options in it, and says
// which of its fields mean nothing in a version.
func (c *cli) readConfig(path string) (*inference.ModelConfig, *serving.Options, error) {
	if path == "" {
		return nil, nil, nil
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil, nil, fmt.Errorf("read config: %w", err)
	}
	config, err := triton.Parse(raw)
	if err != nil {
		return nil, nil, fmt.Errorf("read config: %s: %w", path, err)
	}
	options, warnings, err := triton.Options(config)
	if err != nil {
		return nil, nil, fmt.Errorf("read config: %s: %w", path, err)
	}
	// These say something of a folder of models only.
	if config.GetVersionPolicy() != nil {
		warnings = append(warnings, "version_policy is ignored: a deployment says which version serves")
	}
	if config.GetDefaultModelFilename() != "" {
		warnings = append(warnings, "default_model_filename is ignored: the file is named on the command line")
	}
	for _, o := range config.GetOutput() {
		if o.GetLabelFilename() != "" {
			warnings = append(warnings, fmt.Sprintf("label_filename of output %q is ignored: --labels gives the labels", o.GetName()))
		}
	}
	for _, w := range warnings {
		fmt.Fprintf(c.err, "%s: %s\n", path, w)
	}
	return config, options, nil
}
