"""Renders 3D models as cut-outs with soft alpha, from one to three sides, under panoramas as light.

    python3.11 -m pip install bpy==5.0.1 trimesh==5.2.0 pycollada==0.9.3 pillow scipy
    python3.11 scripts/nano/models.py MODELS_DIR PANORAMAS_DIR OUTPUT_DIR

models.txt names the models; SOURCES.md says what the folders hold. bpy is Blender, which wants a Python of its own version.
Writes OUTPUT_DIR/KIND_NAME_VIEW.png with 512 pixels on the longer side, and passes over what is there already.
"""

import base64
import contextlib
import io
import random
import re
import shutil
import sys
import tempfile
from pathlib import Path

import bpy
import numpy as np
from mathutils import Vector


SIZE = 512
SAMPLES = 8


def load(path: Path) -> list[bpy.types.Object]:
    """Puts a model, .obj, .gltf, .glb or .dae, into an empty scene, and gives its meshes."""
    bpy.ops.wm.read_factory_settings(use_empty=True)
    match path.suffix.lower():
        case ".obj":
            bpy.ops.wm.obj_import(filepath=str(path), up_axis="Y", forward_axis="NEGATIVE_Z")
        case ".dae":
            with tempfile.TemporaryDirectory() as folder:
                bpy.ops.import_scene.gltf(filepath=str(convert_collada(path, Path(folder))))
        case _:
            bpy.ops.import_scene.gltf(filepath=str(path))
    for image in bpy.data.images:
        if image.source == "FILE" and not image.has_data and image.size[0] == 0:
            raise ValueError(f"{image.filepath} is missing.")
    shown = [item for item in bpy.context.scene.objects if item.visible_get()]
    return [item for item in shown if item.type == "MESH" and len(item.data.polygons)]


def convert_collada(path: Path, folder: Path) -> Path:
    """The model as .glb, as Blender 5 reads no .dae."""
    import trimesh

    text = path.read_text(encoding="utf-8")
    # Textures elsewhere: trimesh finds those beside the file alone.
    for name in re.findall(r"<init_from>([^<]*/[^</]+)</init_from>", text):
        shutil.copy(path.parent / name, folder)
        text = text.replace(name, name.rsplit("/", 1)[1])
    (folder / "model.dae").write_text(text, encoding="utf-8")
    scene = trimesh.load_scene(folder / "model.dae")
    scene.apply_transform(trimesh.transformations.rotation_matrix(-np.pi / 2, [1, 0, 0]))
    scene.export(str(folder / "model.glb"))
    return folder / "model.glb"


def corners_of(objects: list[bpy.types.Object]) -> np.ndarray:
    """The corners of all meshes in the world, (corners, 3)."""
    found = []
    graph = bpy.context.evaluated_depsgraph_get()
    for item in objects:
        mesh = item.evaluated_get(graph).data
        corners = np.empty(len(mesh.vertices) * 3, np.float32)
        mesh.vertices.foreach_get("co", corners)
        matrix = np.array(item.matrix_world)
        found.append(corners.reshape(-1, 3) @ matrix[:3, :3].T + matrix[:3, 3])
    return np.concatenate(found)


def vary_materials(dice: random.Random) -> None:
    """Makes glass of what is see-through as a whole, and plastic, lacquer or metal of what has no texture."""
    is_metal = dice.random() < 0.15
    for material in bpy.data.materials:
        shader = material.node_tree and material.node_tree.nodes.get("Principled BSDF")
        if not shader or shader.inputs["Transmission Weight"].default_value > 0:
            continue
        alpha, colour, roughness = (shader.inputs[name] for name in ("Alpha", "Base Color", "Roughness"))
        if not alpha.is_linked and 0.02 < alpha.default_value < 0.95:
            alpha.default_value = 1
            shader.inputs["Transmission Weight"].default_value = 0.9
            roughness.default_value = 0.02
        elif not colour.is_linked and not roughness.is_linked:
            red, green, blue, _ = colour.default_value
            is_grey = max(red, green, blue) - min(red, green, blue) < 0.08 and 0.15 < green < 0.9
            roughness.default_value = dice.choice([0.08, 0.2, 0.35, 0.6])
            shader.inputs["Metallic"].default_value = float(is_metal or (is_grey and dice.random() < 0.5))
            shader.inputs["Coat Weight"].default_value = dice.choice([0.0, 0.0, 0.6])
        elif not roughness.is_linked:
            roughness.default_value = dice.choice([0.25, 0.4, 0.6])


def light(panorama: Path, dice: random.Random) -> None:
    """Lights the scene by a panorama, turned at random and brought to one brightness, and often by a lamp from above."""
    scene = bpy.context.scene
    scene.world = world = bpy.data.worlds.new("light")
    world.cycles.sampling_method, world.cycles.sample_map_resolution = "MANUAL", 128
    world.use_nodes = True
    nodes, links = world.node_tree.nodes, world.node_tree.links
    surroundings = nodes.new("ShaderNodeTexEnvironment")
    surroundings.image = bpy.data.images.load(str(panorama), check_existing=True)
    pixels = np.array(surroundings.image.pixels[:]).reshape(-1, 4)[:, :3]
    turn = nodes.new("ShaderNodeMapping")
    turn.inputs["Rotation"].default_value[2] = dice.uniform(0, 6.28)
    links.new(nodes.new("ShaderNodeTexCoord").outputs["Generated"], turn.inputs["Vector"])
    links.new(turn.outputs["Vector"], surroundings.inputs["Vector"])
    links.new(surroundings.outputs["Color"], nodes["Background"].inputs["Color"])
    nodes["Background"].inputs["Strength"].default_value = dice.uniform(0.45, 0.9) / np.minimum(pixels, 20).mean()
    for lamp in [item for item in scene.objects if item.type == "LIGHT"]:
        bpy.data.objects.remove(lamp)
    if dice.random() < 0.6:
        sun = bpy.data.lights.new("sun", "SUN")
        sun.energy, sun.angle = dice.uniform(0.5, 3), dice.uniform(0.02, 0.5)
        lamp = bpy.data.objects.new("sun", sun)
        lamp.rotation_euler = (dice.uniform(0.2, 1.1), 0, dice.uniform(0, 6.28))
        scene.collection.objects.link(lamp)


def aim(corners: np.ndarray, turn: float, dice: random.Random) -> None:
    """Sets up a camera that looks from `turn` (radians), level or from above, and whose frame holds just the object."""
    scene = bpy.context.scene
    middle = (corners.min(0) + corners.max(0)) / 2
    radius = float(np.linalg.norm(corners - middle, axis=1).max())
    rise = np.radians(dice.choice([dice.uniform(-3, 12), dice.uniform(8, 30), dice.uniform(25, 55)]))
    away = Vector((np.sin(turn) * np.cos(rise), -np.cos(turn) * np.cos(rise), np.sin(rise)))
    distance = radius * dice.uniform(2.6, 5)
    camera = bpy.data.objects.new("camera", bpy.data.cameras.new("camera"))
    camera.location = Vector(middle) + away * distance
    camera.rotation_euler = away.to_track_quat("Z", "Y").to_euler()
    camera.rotation_euler.rotate_axis("Z", dice.gauss(0, 0.06))
    scene.collection.objects.link(camera)
    scene.camera = camera
    bpy.context.view_layer.update()
    to_camera = np.array(camera.matrix_world.inverted())
    seen = corners @ to_camera[:3, :3].T + to_camera[:3, 3]
    plane = seen[:, :2] / -seen[:, 2:]
    low, high = plane.min(0), plane.max(0)
    span = float((high - low).max()) * (1 + 8 / SIZE)
    width, height = np.ceil((high - low) / span * SIZE + 8).clip(16, SIZE).astype(int)
    camera.data.lens, camera.data.sensor_width = 50, 50 * span * max(width, height) / SIZE
    camera.data.sensor_fit = "HORIZONTAL" if width >= height else "VERTICAL"
    camera.data.sensor_height = camera.data.sensor_width
    camera.data.shift_x, camera.data.shift_y = ((low + high) * 25 / camera.data.sensor_width).tolist()
    camera.data.clip_start, camera.data.clip_end = radius * 0.01, radius * 100
    scene.render.resolution_x, scene.render.resolution_y = int(width), int(height)


def choose_renderer() -> None:
    """Cycles on one core, over nothing."""
    scene = bpy.context.scene
    scene.render.engine = "CYCLES"
    scene.render.film_transparent = scene.render.use_persistent_data = True
    scene.render.threads_mode, scene.render.threads = "FIXED", 1
    scene.render.image_settings.file_format, scene.render.image_settings.color_mode = "PNG", "RGBA"
    scene.cycles.samples, scene.cycles.use_denoising, scene.cycles.use_light_tree = SAMPLES, True, False
    scene.cycles.use_adaptive_sampling = False
    scene.cycles.denoising_prefilter, scene.cycles.denoising_quality = "NONE", "FAST"
    scene.cycles.max_bounces, scene.cycles.transparent_max_bounces = 5, 12
    scene.cycles.diffuse_bounces, scene.cycles.glossy_bounces, scene.cycles.transmission_bounces = 1, 2, 5
    scene.cycles.sample_clamp_indirect = 4


def render(path: Path, title: str, outputs: list[Path], panoramas: list[Path]) -> None:
    """Writes the views of one model."""
    dice = random.Random(title)
    with contextlib.redirect_stdout(io.StringIO()):
        corners = corners_of(load(path))
    choose_renderer()
    vary_materials(dice)
    start = dice.uniform(-0.8, 0.8)
    for view, output in enumerate(outputs):
        dice.seed(f"{title} {view}")
        light(dice.choice(panoramas), dice)
        aim(corners, start + view * 2 * np.pi / len(outputs) + dice.uniform(-0.4, 0.4), dice)
        bpy.context.scene.view_settings.view_transform = dice.choice(["Standard", "AgX"])
        bpy.context.scene.render.filepath = str(output)
        bpy.ops.render.render(write_still=True)


def main(models: str, panoramas: str, output: str) -> None:
    Path(output).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for module in Path(panoramas).glob("*.exr.js"):
            encoded = re.search(r"base64,([A-Za-z0-9+/=]+)", module.read_text(encoding="utf-8")).group(1)
            (Path(folder) / module.stem).write_bytes(base64.b64decode(encoded))
        lights = sorted(Path(folder).iterdir())
        if not lights:
            sys.exit(f"{panoramas} holds no panoramas (*.exr.js): see SOURCES.md.")
        for line in (Path(__file__).parent / "models.txt").read_text(encoding="utf-8").splitlines():
            kind, name, views, path = line.split(" ", 3)
            outputs = [Path(output) / f"{kind}_{name}_{view:02d}.png" for view in range(int(views))]
            if not all(file.exists() for file in outputs):
                render(Path(models) / path, f"{kind} {name}", outputs, lights)


if __name__ == "__main__":
    main(*sys.argv[1:])
