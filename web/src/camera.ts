// The camera: a stream, shown frame by frame as the network keeps up.

/** What went wrong with the camera, in words for the user. */
export class CameraError extends Error {}

export class Camera {
  private constructor(
    private readonly stream: MediaStream,
    private readonly video: HTMLVideoElement,
  ) {}

  static async open(device: string | null): Promise<Camera> {
    if (!navigator.mediaDevices) {
      throw new CameraError("The browser offers no camera here: open the page over https or on this machine.");
    }
    const choice: MediaTrackConstraints = device ? { deviceId: { exact: device } } : { facingMode: { ideal: "environment" } };
    let stream: MediaStream;
    try {
      stream = await navigator.mediaDevices.getUserMedia({ audio: false, video: { ...choice, width: { ideal: 1280 } } });
    } catch (error) {
      throw new CameraError(reasonOf(error));
    }
    const video = document.createElement("video");
    video.muted = true;
    video.playsInline = true;
    video.srcObject = stream;
    await video.play();
    return new Camera(stream, video);
  }

  /** Id and name of every camera; the names are known once one was opened. */
  static async list(): Promise<{ id: string; name: string }[]> {
    const devices = await navigator.mediaDevices.enumerateDevices();
    const cameras = devices.filter((device) => device.kind === "videoinput");
    return cameras.map((device, index) => ({ id: device.deviceId, name: device.label || `Camera ${index + 1}` }));
  }

  get device(): string {
    return this.stream.getVideoTracks()[0]?.getSettings().deviceId ?? "";
  }

  onEnd(listener: () => void): void {
    this.stream.getVideoTracks()[0]?.addEventListener("ended", listener);
  }

  /** The picture of this moment. */
  grab(): Promise<ImageBitmap> {
    return createImageBitmap(this.video);
  }

  close(): void {
    for (const track of this.stream.getTracks()) track.stop();
    this.video.srcObject = null;
  }
}

function reasonOf(error: unknown): string {
  const name = error instanceof DOMException ? error.name : "";
  if (name === "NotAllowedError") return "The camera is not allowed: allow it in the browser's address bar and try again.";
  if (name === "NotFoundError" || name === "OverconstrainedError") return "No camera was found: connect one and try again.";
  if (name === "NotReadableError") return "The camera is in use by another program: close that one and try again.";
  return `The camera cannot be opened: ${error instanceof Error ? error.message : String(error)}.`;
}
