// Package dunlinv1 is what crosses MQTT between agents and the controller, the
// chunk index of a bundle, and the controller's API.
package dunlinv1
