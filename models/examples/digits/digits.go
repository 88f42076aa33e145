// Package digits embeds the digits example: three versions of a model and the images that none of them was trained on.
package digits

import (
	"embed"
	"encoding/binary"
)

// Models holds "v1.onnx" (linear), "v2.onnx" (convolutional) and "v3-bad.onnx"
// (trained on shuffled labels). README.md describes them.
//
//go:embed v1.onnx v2.onnx v3-bad.onnx
var Models embed.FS

// CascadeBound is how sure v1 must be, by the largest of its probabilities, to
// answer instead of v2. train.py chooses it on the training images.
const CascadeBound = 0.95

var (
	//go:embed heldout-images.npy
	heldOutImages []byte
	//go:embed heldout-labels.npy
	heldOutLabels []byte
)

// HeldOut returns the 600 held-out images, each 8x8 pixels row by row with
// values 0 to 16 as the models take them, and the digit that each one shows.
func HeldOut() (images [][64]float32, labels []int) {
	pixels, digits := npyData(heldOutImages), npyData(heldOutLabels)
	images = make([][64]float32, len(digits))
	labels = make([]int, len(digits))
	for i := range images {
		for j := range images[i] {
			images[i][j] = float32(pixels[64*i+j])
		}
		labels[i] = int(digits[i])
	}
	return images, labels
}

// npyData returns what follows the header of a version 1 .npy file; both files
// are C-ordered uint8.
func npyData(file []byte) []byte {
	const prefix = 10 // magic, version, length of the header
	return file[prefix+int(binary.LittleEndian.Uint16(file[8:])):]
}
